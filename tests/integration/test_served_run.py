"""Whole runs with a served teacher: in this process, and as the command with two processes."""

import json

import pytest

from distill import isolated
from distill.errors import UserError
from distill.recipe import compose
from distill.train import train
from tests.integration.commands import call
from tests.log_prob_server import serve
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, tiny, world


@pytest.fixture(scope="module")
def teacher(_module_store):
    made = world(**LANGUAGE)
    with serve(made.model(), made.tokenizer) as server:
        yield server


def recipe(server):
    student = LANGUAGE["teacher"]["config"] | {"n_layer": 1}
    return LANGUAGE | {
        "teacher": {"outputs": "served", "url": server.url, "tokens": 20, "config": None},
        "student": {"layers": None, "config": student},
        "loss": {"temperature": 1.0},
        "trainer": {"max_steps": 2, "validations": 1, "progress": False, "accelerator": "cpu"},
    }


@pytest.mark.slow
def test_whole_runs_in_one_and_two_processes(teacher, tmp_path, monkeypatch):
    """A proven student, no measurements of the teacher, and the same stored outputs."""
    monkeypatch.setattr(isolated, "run_isolated", run_here)
    run, caches = tiny(**recipe(teacher)), [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setenv("DISTILL_CACHE", str(caches[0]))
    metrics = train(run, tmp_path / "run")
    assert "teacher" not in metrics
    assert metrics["student"]
    export = tmp_path / "run" / "export"
    assert json.loads((export / "proof.json").read_text())["agreement"] == 1
    assert "served" in (export / "README.md").read_text()

    compose.save_recipe(run, tmp_path / "recipe.yaml")
    code, _, err = call(
        "train",
        f"recipe={tmp_path / 'recipe.yaml'}",
        "trainer.devices=2",
        "export.format=null",
        cwd=tmp_path,
        DISTILL_CACHE=str(caches[1]),
    )
    assert code == 0, err
    stored = [next(cache.glob("outputs/*/outputs.arrow")).read_bytes() for cache in caches]
    assert stored[0] == stored[1]
    assert not list(caches[1].glob("served/*/*"))  # the chunks, once they are joined


def test_a_server_that_is_down_ends_a_run(teacher, tmp_path):
    changes = recipe(teacher)
    changes["teacher"] = changes["teacher"] | {"url": "http://127.0.0.1:9/v1"}
    with pytest.raises(UserError, match="teacher.url is http://127.0.0.1:9/v1"):
        train(tiny(**changes), tmp_path)
