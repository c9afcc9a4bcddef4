"""Places that cannot be written, and results that were removed: noticed, and nothing lost."""

import errno
import json
import os
import sys
import tempfile
from unittest import mock

import pytest

from distill import places, prepare, store
from distill.errors import UserError
from distill.evaluate import console, evaluate_command
from distill.export import Options, command
from distill.recipe import compose
from distill.stages import Stages
from tests.unit import tiny_runs
from tests.worlds import tiny


class Reached(Exception):
    """Raised where a command would begin its work."""


@pytest.fixture
def full(monkeypatch):
    """A disk on which files can be made, but hold nothing."""

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(places.os, "fsync", fsync)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        places.check_places(folder)
    return str(caught.value)


def test_places_that_can_be_written_are_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    places.check_places(tmp_path / "run")
    assert [*(tmp_path / "run").iterdir(), *(tmp_path / "cache").iterdir()] == []


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_the_place_of_a_folder_is_named(below, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    blocked = tmp_path / "file" / below
    assert f"hydra.run.dir is {blocked}, but" in refusal(blocked)
    monkeypatch.setenv("DISTILL_CACHE", str(blocked))
    assert f"DISTILL_CACHE is {blocked}, but" in refusal(tmp_path / "run")


def test_a_full_disk_is_named(full, tmp_path):
    assert os.strerror(errno.ENOSPC) in refusal(tmp_path)


def test_without_a_place_for_temporary_files_the_variable_is_named(tmp_path, monkeypatch):
    def gettempdir():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    assert "TMPDIR is /nowhere, but" in refusal(tmp_path)


def test_a_measurement_is_printed_if_it_cannot_be_written(monkeypatch):
    shown = []
    monkeypatch.setattr(console, "show", shown.append)
    with console.show_on_error("metrics"):
        pass
    with pytest.raises(OSError, match="full"), console.show_on_error("metrics"):
        raise OSError("full")
    assert shown == ["metrics"]


@pytest.mark.parametrize("exports", [True, False])
@pytest.mark.parametrize("removed", ["student/config.json", "metrics.json", "export/README.md"])
def test_stages_whose_files_are_gone_are_lost(removed, exports, tmp_path):
    files = {
        "student": "student/config.json",
        "evaluate": "metrics.json",
        "export": "export/README.md",
    }
    stage = Stages(tmp_path)
    assert stage.lost(tmp_path, exports) == []  # nothing is done yet
    for name, file in files.items():
        with stage(name):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    assert stage.lost(tmp_path, exports) == []
    (tmp_path / removed).unlink()
    names = [name for name, file in files.items() if file == removed]
    assert stage.lost(tmp_path, exports) == (names if exports or names != ["export"] else [])


def test_a_student_without_its_weights_is_lost(tmp_path):
    stage = Stages(tmp_path)
    with stage("student"), store.write_entry(tmp_path / "student") as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()
    assert stage.lost(tmp_path, False) == []
    (tmp_path / "student" / "model.safetensors").unlink()
    assert stage.lost(tmp_path, False) == ["student"]
    (tmp_path / "student" / "manifest.json").write_text("damaged")
    assert stage.lost(tmp_path, False) == []


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_an_export_without_its_weights_is_lost(damage, tmp_path):
    stage, folder = Stages(tmp_path), tmp_path / "export"
    weights = folder / "packed.safetensors"
    with stage("export"):
        folder.mkdir()
        weights.write_bytes(bytes(5000))
        (folder / "proof.json").write_text(json.dumps({"bytes": 5000}))
        (folder / "README.md").write_text("A card.")
    assert stage.lost(tmp_path, True) == []
    weights.unlink() if damage == "removed" else weights.write_bytes(bytes(4000))
    assert stage.lost(tmp_path, True) == ["export"]
    assert stage.lost(tmp_path, False) == []


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_measurement_waits_for_a_run_in_progress_if_it_is_written_there(
    split, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "_LOCK_TIMEOUT", 0)
    monkeypatch.setattr(evaluate_command, "_warn_of_other_holdout", mock.Mock(side_effect=Reached))
    run, *_ = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    monkeypatch.setattr(prepare, "prepare", mock.Mock())
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={tmp_path}", f"split={split}"])
    expected = UserError if split == "test" else Reached
    with store.exclusive_access(tmp_path), pytest.raises(expected):
        evaluate_command.main.__wrapped__()
    with pytest.raises(Reached):
        evaluate_command.main.__wrapped__()


def test_an_export_waits_for_a_run_in_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_LOCK_TIMEOUT", 0)
    compose.save_recipe(tiny(), tmp_path / "recipe.yaml")
    with (
        store.exclusive_access(tmp_path),
        pytest.raises(UserError, match=f"run folder is {tmp_path}"),
    ):
        command.export_folder(tmp_path, Options())
