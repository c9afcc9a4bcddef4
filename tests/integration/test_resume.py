"""Killed and resumed runs end with the same bytes; the messages and refusals of resuming."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import isolated, resume, store
from distill.errors import UserError
from distill.recipe import compose, config
from distill.stages import VERSION, Stages
from distill.train import train
from distill.training import checkpoint_files, checkpoints, loggers
from tests.integration.commands import assert_one_sentence, call, run_folders, start
from tests.techniques import TECHNIQUES
from tests.unit.tiny_runs import run_here
from tests.worlds import tiny

TEACHER = {"teacher": {"finetune": {"epochs": 0.2, "lr": 1e-3}}}
STAGES = ("start", "data", "teacher", "cache", "student", "evaluate", "export")


def job(kills, seed, teacher=TEACHER, **trainer):
    changes = teacher | {key: trainer.pop(key) for key in ("data",) if key in trainer}
    return {"changes": changes | {"trainer": trainer}, "kills": kills, "seed": seed, "twice": True}


FEW = {"max_steps": 12, "validations": 4, "checkpoint": {"steps": 2}}
MANY = {"max_steps": 40, "validations": 5, "checkpoint": {"steps": 3}}  # more than an epoch
EVERYWHERE = dict.fromkeys(STAGES, 1) | {"teacher": 2, "student": 3}
TRAINING = {"teacher": 1, "student": 3}
ORDINARY = {"accumulation": job(EVERYWHERE, 0, **FEW, accumulate=2)}
LONGER = {
    "every stage": job(dict.fromkeys(STAGES, 4) | {"start": 3, "student": 12}, 1, **FEW),
    "workers": job(TRAINING, 2, **MANY, data={"workers": 2}),
    "bf16": job(TRAINING, 3, **MANY, precision="bf16-mixed", accumulate=3),
    "patience": job(TRAINING, 4, **MANY | {"validations": 20}, patience=2),
    "online": job({"student": 3}, 5, {"teacher": {"outputs": "online"}}, **MANY),
}
SHORT = {"trainer": {"max_steps": 12, "validations": 3, "checkpoint": {"steps": 2}}}
ROWS = {
    row: {"row": row, "changes": SHORT, "kills": {"student": 1}, "seed": seed}
    for seed, row in enumerate(TECHNIQUES)
}


def killed(folder, jobs):
    """What differs after each kill, for each job; one process for all of them."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable,
        str(Path(__file__).with_name("killed.py")),
        str(folder),
        str(folder / "jobs.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def assert_identical(results, jobs):
    assert results.keys() == jobs.keys()
    for name, attempts in results.items():
        assert len(attempts) == sum(jobs[name]["kills"].values())
        for attempt in attempts:
            assert attempt["killed"] >= 1, (name, attempt)
            assert attempt["different"] == [], (name, attempt)


@pytest.mark.slow
def test_killed_in_any_stage_a_run_ends_with_the_same_bytes(tmp_path):
    assert_identical(killed(tmp_path, ORDINARY), ORDINARY)


def test_killed_in_mid_epoch_a_technique_ends_with_the_same_bytes(tmp_path):
    everything = {"everything": ROWS["everything"]}
    assert_identical(killed(tmp_path, everything), everything)


@pytest.mark.slow
@pytest.mark.long
def test_killed_in_mid_epoch_every_technique_ends_with_the_same_bytes(tmp_path):
    assert_identical(killed(tmp_path, ROWS), ROWS)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", LONGER)
def test_killed_more_often_in_more_ways(name, tmp_path):
    jobs = {name: LONGER[name]}
    assert_identical(killed(tmp_path, jobs), jobs)


# ---- in this process


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", run_here)


class Plug(BaseException):
    """Pulled."""


def cut(monkeypatch, run, folder, step=7):
    """A run that ends as if killed after this step of the student's training."""
    seen = checkpoints.PerBatchSeed.on_train_batch_start

    def pulled(self, trainer, *rest):
        if trainer.global_step == step:
            raise Plug
        seen(self, trainer, *rest)

    with monkeypatch.context() as patch, pytest.raises(Plug):
        patch.setattr(checkpoints.PerBatchSeed, "on_train_batch_start", pulled)
        train(run, folder)


def everything(folder):
    """All files with their contents and times."""
    return {
        str(file): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def small(**changes):
    trainer = {"max_steps": 10, "validations": 2, "checkpoint": {"steps": 2}} | changes.pop(
        "trainer", {}
    )
    return tiny(trainer=trainer, **changes)


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path, capsys):
    metrics = train(small(), tmp_path / "run")
    before = everything(tmp_path / "run")
    capsys.readouterr()
    assert train(
        compose.load_recipe(str(tmp_path / "run" / "recipe.yaml")), tmp_path / "run"
    ) == json.loads(json.dumps(metrics))
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished: nothing is left to do\n"
    assert everything(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "removed", [("student", "export"), ("metrics.json",), ("export/model.safetensors",)]
)
def test_results_that_were_removed_are_made_again(removed, tmp_path, capsys, caplog):
    folder = tmp_path / "run"
    train(small(), folder)
    before = {
        name: (folder / name / "model.safetensors").read_bytes() for name in ("student", "export")
    }
    for name in removed:
        path = folder / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    capsys.readouterr()
    train(small(), folder)
    assert "nothing is left to do" not in capsys.readouterr().out
    assert "made again" in caplog.text
    assert (folder / "metrics.json").is_file()
    for name, content in before.items():
        assert (folder / name / "model.safetensors").read_bytes() == content
    train(small(), folder)
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_named_and_the_end_is_the_same(
    tmp_path, monkeypatch, caplog
):
    train(small(), tmp_path / "whole")
    cut(monkeypatch, small(), tmp_path / "cut")
    newest = checkpoint_files.newest_intact(tmp_path / "cut" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    train(small(), tmp_path / "cut")
    assert (
        "step-00000005.ckpt in" in caplog.text
        and "step-00000004.ckpt is used in its place" in caplog.text
    )
    for name in ("student/model.safetensors", "logs/student/metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_stages_that_are_done_are_not_repeated(tmp_path, monkeypatch):
    run = small(export={"format": None})
    train(run, tmp_path)
    stage = Stages(tmp_path)
    stage.again(["evaluate", "export"])
    monkeypatch.setattr("distill.student.train_student", None)
    monkeypatch.setattr("distill.teacher.obtain", None)
    metrics = train(run, tmp_path)
    assert metrics["training"]["steps"] == 10
    stage = Stages(tmp_path)
    stage.again(["export"])
    monkeypatch.setattr("distill.evaluate.evaluate", None)
    assert train(run, tmp_path)["student"] == metrics["student"]


HARMFUL = {
    "seed": {"seed": 1},
    "student.layers": {"student": {"layers": [0, 1]}},
    "loss.alpha": {"loss": {"alpha": 0.4}},
    "data.batch_size": {"data": {"batch_size": 8}},
    "teacher.dtype": {"teacher": {"dtype": "bfloat16"}},
    "trainer.accumulate": {"trainer": {"accumulate": 2}},
    "trainer.max_steps": {"trainer": {"max_steps": 9}},
    "callbacks.mine._target_": {
        "callbacks": {"mine": {"_target_": "lightning.pytorch.callbacks.Timer"}}
    },
}


def test_what_would_make_it_another_run_is_refused_with_the_list(tmp_path):
    resume.open_run_folder(small(), tmp_path)
    before = everything(tmp_path)
    for key, change in HARMFUL.items():
        with pytest.raises(
            UserError, match=rf"resume is {tmp_path}, but .*: (.*, )?{key} was .* and is "
        ):
            resume.open_run_folder(small(**change), tmp_path)
    with pytest.raises(UserError, match=r"loss\.alpha was 0\.5 and is 0\.1, seed was 0 and is 3: "):
        resume.open_run_folder(
            small(loss={"alpha": 0.1}, seed=3, tracking={"project": "other"}), tmp_path
        )
    assert everything(tmp_path) == before


def written_by_older_code(folder):
    """Checkpoints had no version, and the callbacks in them other names."""
    file = folder / "progress.json"
    progress = json.loads(file.read_text())
    del progress["version"]
    file.write_text(json.dumps(progress, indent=1) + "\n")


def test_training_does_not_go_on_from_checkpoints_of_older_code(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    cut(monkeypatch, small(), folder)
    written_by_older_code(folder)
    before = everything(folder)
    with pytest.raises(
        UserError, match=f"resume is {folder}, but .* version 1, .* version {VERSION}"
    ):
        train(small(), folder)
    assert everything(folder) == before
    (folder / "progress.json").write_text("damaged")
    with pytest.raises(
        UserError, match=f"resume is {folder}, but .* version 1, .* version {VERSION}"
    ):
        train(small(), folder)


def test_without_checkpoints_a_run_of_older_code_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Plug):
        patch.setattr("distill.student.train_student", raise_plug)
        train(small(), tmp_path)
    written_by_older_code(tmp_path)
    assert train(small(), tmp_path)["training"]["steps"] == 10
    assert Stages(tmp_path).version == VERSION


def raise_plug(*_, **__):
    raise Plug


def test_a_run_that_older_code_finished_is_measured_and_exported_but_not_trained_on(
    tmp_path, capsys
):
    first = train(small(), tmp_path)
    written_by_older_code(tmp_path)
    capsys.readouterr()
    train(small(), tmp_path)
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    student = (tmp_path / "student" / "model.safetensors").stat().st_ino
    second = train(small(evaluate={"bootstrap": 30}), tmp_path)
    assert (tmp_path / "student" / "model.safetensors").stat().st_ino == student
    assert (first["resamples"], second["resamples"]) == (20, 30)
    with pytest.raises(UserError, match="version 1"):
        train(small(evaluate={"bootstrap": 30}, trainer={"max_steps": 14}), tmp_path)


def test_changes_that_leave_results_alone_are_logged_and_saved(tmp_path, caplog):
    resume.open_run_folder(small(), tmp_path)
    changed = small(
        tracking={"project": "other"}, data={"workers": 1}, trainer={"checkpoint": {"keep": 3}}
    )
    with caplog.at_level("INFO", logger="distill"):
        resume.open_run_folder(changed, tmp_path)
    assert (
        "data.workers was 0 and is 1, tracking.project was distill and is other, "
        "trainer.checkpoint.keep was 2 and is 3" in caplog.text
    )


def test_more_steps_go_on_from_the_last_once_nothing_refuses_the_change(tmp_path):
    train(small(), tmp_path)
    before = everything(tmp_path)
    late = {"late": {"_target_": "distill.callbacks.Quantize", "start": 12}}
    resume.open_run_folder(small(trainer={"max_steps": 14}), tmp_path)
    assert everything(tmp_path) == before
    with pytest.raises(UserError):
        train(small(trainer={"max_steps": 14}, callbacks=late), tmp_path)
    assert everything(tmp_path) == before
    metrics = train(small(trainer={"max_steps": 14}), tmp_path)
    assert compose.load_recipe(str(tmp_path / "recipe.yaml")).trainer.max_steps == 14
    assert_went_on_from_the_last_step(tmp_path, metrics)


def assert_went_on_from_the_last_step(folder, metrics):
    steps = [
        int(line.split(",")[1])
        for line in (folder / "logs" / "student" / "metrics.csv").read_text().splitlines()[1:]
    ]
    assert metrics["training"]["steps"] == 14
    assert steps == sorted(steps) and steps[-1] == 13
    rates = [
        float(row["train/lr"])
        for row in logged(folder)
        if row["train/lr"] and int(row["step"]) >= 10
    ]
    assert rates == sorted(
        rates, reverse=True
    )  # of the schedule as it is now: it does not begin at the end of the former
    assert len(rates) == 4 and rates[-1] > 0


def test_other_examples_under_the_same_name_are_noticed(tmp_path, monkeypatch):
    cut(monkeypatch, small(), tmp_path)
    monkeypatch.setattr("distill.data.fingerprint", lambda split: "another")
    with pytest.raises(UserError, match="its examples are not those with which the run started"):
        train(small(), tmp_path)


def test_what_is_no_run_s_is_neither_used_nor_removed(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(
        UserError, match=f"hydra.run.dir is {tmp_path}, but it holds student and no recipe.yaml"
    ):
        train(small(), tmp_path)
    resume.remove_if_unused(tmp_path)
    assert everything(tmp_path) == before


def test_a_run_killed_while_it_wrote_its_recipe_begins_again(tmp_path):
    (tmp_path / f"{store.TEMPORARY_PREFIX}{resume.RECIPE_FILE}").write_text("seed: ")
    resume.open_run_folder(small(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [resume.RECIPE_FILE]


def test_what_a_refused_run_left_is_removed_unless_somebody_is_at_work(tmp_path):
    def left(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.log").write_text("refused")
        return tmp_path / name

    with store.exclusive_access(left("busy")):
        resume.remove_if_unused(tmp_path / "busy")
    resume.remove_if_unused(left("idle"))
    assert [folder.name for folder in tmp_path.iterdir()] == ["busy"]


def logged(folder):
    with (folder / "logs" / "student" / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_what_a_killed_process_left_is_gone_and_its_earlier_export_comes_back(tmp_path):
    for name in (
        ".writing-a/b",
        ".export-1a2b/model",
        ".export-3c4d-old/model",
        "checkpoints/.writing-step.ckpt/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    resume.remove_leftovers(tmp_path)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "checkpoints",
        "export",
        "export/model",
    ]


def test_two_processes_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_LOCK_TIMEOUT", 0)
    with (
        store.exclusive_access(tmp_path),
        pytest.raises(UserError, match="another process is working in it"),
        store.exclusive_access(tmp_path),
    ):
        pass
    with store.exclusive_access(tmp_path):
        pass


# ---- the table and the tracker


def test_no_step_is_twice_in_the_table(tmp_path):
    table = loggers.CsvLogger(tmp_path / "metrics.csv")
    for step in range(6):
        table.log_metrics(
            {"train/loss": step / 2} | ({"val/accuracy": 0.5} if step % 2 else {}), step
        )
    whole = table.file.read_bytes()
    table.file.write_bytes(whole[:-3])  # as a killed process may leave it
    again = loggers.CsvLogger(tmp_path / "metrics.csv")
    again.drop_from_step(3)
    for step in range(3, 6):
        again.log_metrics(
            {"train/loss": step / 2} | ({"val/accuracy": 0.5} if step % 2 else {}), step
        )
    assert table.file.read_bytes() == whole


def test_what_a_killed_run_has_sent_to_wandb_is_not_sent_again(tmp_path):
    class Experiment:
        def __init__(self):
            self.sent = []

        def log(self, row):
            self.sent.append(row)

    run, experiment = small(tracking={"wandb": "disabled"}), Experiment()
    for first, last in ((0, 6), (3, 9)):
        tracker = loggers.Tracker(run, tmp_path)
        tracker.run = experiment
        own = tracker.loggers("student")
        own[0].drop_from_step(first)
        for step in range(first, last):
            for row in ({"train/loss": step / 2, "epoch": 0}, {"val/accuracy": 0.5, "epoch": 0}):
                for logger in own:
                    logger.log_metrics(row, step)
    steps = [(row["trainer/global_step"], "student/train/loss" in row) for row in experiment.sent]
    assert steps == [(step, first) for step in range(9) for first in (True, False)]


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    started = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        "wandb.init", lambda **given: started.append((given["id"], given["resume"]))
    )
    tracking = config.Tracking(wandb="offline")
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        loggers.start_wandb(tracking, "tiny/run", {}, folder)
    assert started[0] == started[1] != started[2]
    assert started[0][1] == "allow"


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resume=nowhere"], ["resume is nowhere", "no such folder"]),
        (["resume=last"], ["resume is last", "runs"]),
        (["resume=."], ["holds no recipe.yaml"]),
        (["resume=.", "recipe=tiny"], ["resume is .", "recipe=tiny"]),
        (["-m", "resume=."], ["resume is .", "-m"]),
    ],
)
def test_a_folder_that_cannot_be_resumed_is_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        resume.expand_resume(arguments)
    assert all(word in str(refused.value) for word in words)


def test_last_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in ((30, "runs/b/1"), (10, "runs/a/it's 2"), (20, "runs/sweeps/1/0")):
        compose.save_recipe(small(), tmp_path / name / "recipe.yaml")
        os.utime(tmp_path / name / "recipe.yaml", (time.time() - age,) * 2)
    assert resume.expand_resume(["resume=last", "trainer.epochs=9"]) == [
        "recipe=runs/a/it's 2/recipe.yaml",
        "trainer.epochs=9",
        "hydra.run.dir='runs/a/it\\'s 2'",
    ]


SMALL = ["evaluate.bootstrap=50", "evaluate.requests=1", "evaluate.batches=1", "export.format=null"]
FAST = ["trainer.epochs=1", "teacher.finetune.epochs=1", *SMALL]


def ended(cwd, number, *arguments, at="step 15 of 1200"):
    """A command that gets a signal as soon as it says so."""
    process = start("train", *arguments, cwd=cwd, DISTILL_CACHE=str(cwd / "store"))
    lines = []
    for line in process.stderr:
        lines.append(line)
        if at in line:
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=120)
    return process.returncode, "".join(lines) + rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 75, "ended by SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long),
    ],
)
def test_a_signal_in_training_saves_says_how_to_go_on_and_a_scheduler_s_command_does(
    number, code, word, tmp_path
):
    command = ["recipe=tiny", *FAST, "hydra.run.dir=mine"]
    status, err = ended(
        tmp_path,
        number,
        *command,
        "trainer.epochs=40",
        "trainer.validations=80",
        at="step 15 of 1200",
    )
    assert status == code, err
    assert_one_sentence(err, word, "python -m distill.train resume=mine")
    newest = checkpoint_files.step_of(
        checkpoint_files.newest_intact(tmp_path / "mine" / "checkpoints")
    )
    assert newest >= 15
    code, _, err = call(
        "train",
        "resume=mine",
        "loss.alpha=0.1",
        cwd=tmp_path,
        DISTILL_CACHE=str(tmp_path / "store"),
    )
    assert code == 2
    assert_one_sentence(err, "resume is mine", "loss.alpha was 0.5 and is 0.1")
    status, err = ended(
        tmp_path,
        signal.SIGTERM,
        *command,
        "trainer.epochs=40",
        "trainer.validations=80",
        at="resuming from",
    )
    assert status == 75, err
    assert f"resuming from mine/checkpoints/step-{newest:08d}.ckpt" in err


@pytest.mark.slow
def test_a_signal_elsewhere_ends_at_once(tmp_path):
    code, err = ended(
        tmp_path, signal.SIGTERM, "recipe=tiny", *FAST, at="measuring teacher and student: cost"
    )
    assert code == 75, err
    folder = run_folders(tmp_path)[0].relative_to(tmp_path)
    assert_one_sentence(err, "ended by SIGTERM", f"resume={folder}")
    code, out, err = call(
        "train", "resume=last", cwd=tmp_path, DISTILL_CACHE=str(tmp_path / "store")
    )
    assert code == 0, err
    assert "── student " not in err and "── evaluate " in err
    code, out, err = call(
        "train", "resume=last", cwd=tmp_path, DISTILL_CACHE=str(tmp_path / "store")
    )
    assert (code, out, err) == (0, f"{folder} is finished: nothing is left to do\n", "")
