"""The commands, in their own processes: a run is measured again, exported again, interrupted."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.grids import sampled
from tests.integration.commands import assert_one_sentence, call, run_folders, start

FAST = [
    "trainer.epochs=2",
    "teacher.finetune.epochs=4",
    "evaluate.bootstrap=50",
    "evaluate.requests=3",
    "evaluate.batches=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _module_store):
    """A folder in which the tiny recipe has been run, and what the command printed."""
    cwd = tmp_path_factory.mktemp("user")
    code, out, err = call("train", "recipe=tiny", *FAST, cwd=cwd)
    assert code == 0, err
    return cwd, run_folders(cwd)[0], out, err


def test_a_run_names_its_stages_and_ends_with_the_table_and_the_paths(finished):
    cwd, folder, out, err = finished
    places = [
        err.index(f"── {name} ")
        for name in ("data", "teacher", "cache", "student", "evaluate", "export")
    ]
    assert places == sorted(places)
    assert all(
        word in out
        for word in ("teacher", "student", "ratio", "accuracy", "latency", "bytes on disk")
    )
    assert f"run: {folder.relative_to(cwd)}\n" in out
    assert "Traceback" not in err


def test_the_run_folder_holds_everything(finished):
    _, folder, _, _ = finished
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {
        "recipe.yaml",
        "train.log",
        "metrics.json",
        "report.md",
        "logs/student/metrics.csv",
        "logs/teacher/metrics.csv",
    } <= there
    assert {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "export/proof.json",
        "export/README.md",
    } <= there
    for model in ("teacher", "student", "export"):
        assert {
            f"{model}/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")
        } <= there


def test_the_log_accounts_for_every_tensor_of_a_cut_student(finished):
    _, folder, _, err = finished
    log = (folder / "train.log").read_text()
    assert (
        "copied: distilbert.transformer.layer.{0,1}.attention.q_lin.weight "
        "<- bert.encoder.layer.{0,2}" in log
    )
    assert "copied: distilbert" not in err


@pytest.mark.slow
def test_a_finished_run_is_measured_again(finished):
    cwd, folder, _, _ = finished
    (folder / "metrics.json").rename(folder / "first.json")
    code, out, err = call("evaluate", f"run={folder}", cwd=cwd)
    assert code == 0, err
    first, again = (
        json.loads((folder / name).read_text()) for name in ("first.json", "metrics.json")
    )
    assert first["student"]["quality"] == again["student"]["quality"]
    assert first["fidelity"] == again["fidelity"]
    assert "ratio" in out


@pytest.mark.slow
def test_a_finished_run_is_exported_again_from_any_folder(finished, tmp_path):
    _, folder, _, _ = finished
    shutil.rmtree(folder / "export")
    code, out, err = call("export", f"run={folder}", "dtype=bfloat16", cwd=tmp_path)
    assert code == 0, err
    assert json.loads((folder / "export" / "proof.json").read_text())["dtype"] == "bfloat16"
    assert "export" in out


@pytest.mark.slow
def test_a_sweep_of_the_user_s_own_recipe_uses_teacher_and_outputs_again(tmp_path, finished):
    source = finished[1] / "recipe.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        source.read_text().replace("name: tiny", "name: mine")
    )
    code, _, err = call(
        "train", "-m", "recipe=mine", "loss.alpha=0.2,0.8", "export.format=null", cwd=tmp_path
    )
    assert code == 0, err
    recipes = sorted(tmp_path.glob("runs/sweeps/*/*/recipe.yaml"))
    assert [
        line for file in recipes for line in file.read_text().splitlines() if "alpha" in line
    ] == ["  alpha: 0.2", "  alpha: 0.8"]
    assert err.count("teacher of an earlier run with the same ingredients is used again") == 2
    assert err.count("outputs of an earlier run with the same ingredients are used again") == 2


# ---- Ctrl-C


def interrupted(cwd, store, stage):
    """A run that gets Ctrl-C as soon as it logs the beginning of this stage."""
    slow = {"teacher": ["teacher.finetune.epochs=40"], "student": ["trainer.epochs=40"]}.get(
        stage, []
    )
    process = start("train", "recipe=tiny", *FAST, *slow, cwd=cwd, DISTILL_CACHE=str(store))
    lines = []
    for line in process.stderr:
        lines.append(line)
        if f"── {stage} " in line:
            time.sleep(2 if slow else 0.3)
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=120)
    return process.returncode, out, "".join(lines) + rest


STAGES = sampled(["teacher", "data", "student", "cache", "export", "evaluate"], every=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_sentence_and_loses_nothing_that_was_finished(stage, tmp_path):
    code, _, err = interrupted(tmp_path, tmp_path / "store", stage)
    assert code == 130, err
    assert_one_sentence(err, "interrupted")
    assert not list(tmp_path.rglob("export/*"))
    assert not [
        path for path in tmp_path.rglob("*") if path.name.startswith((".writing", ".export"))
    ]
    rest = [] if stage == "export" else ["export.format=null"]
    code, _, again = call(
        "train", "recipe=tiny", *FAST, *rest, cwd=tmp_path, DISTILL_CACHE=str(tmp_path / "store")
    )
    assert code == 0, again
    if stage in ("cache", "student", "evaluate", "export"):
        assert "teacher of an earlier run with the same ingredients is used again" in again


# ---- installed


@pytest.mark.slow
def test_the_wheel_brings_recipes_and_runs_anywhere(tmp_path, finished):
    """Built from the checkout and unpacked elsewhere; the dependencies are those installed here."""
    from tests.integration.commands import ROOT

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    site = tmp_path / "site"
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), site, "zip")
    assert sorted(path.name for path in site.iterdir() if not path.name.endswith(".dist-info")) == [
        "distill"
    ]
    assert {"tiny.yaml", "bert_to_distil.yaml"} <= {
        file.name for file in (site / "distill" / "recipes").iterdir()
    }
    code, _, err = call("train", "recipe=tiny", *FAST, cwd=tmp_path, PYTHONPATH=str(site))
    assert code == 0, err
    assert len(run_folders(tmp_path)) == 1
