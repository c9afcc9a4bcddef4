"""The shipped recipes on a real BERT and real news: minutes on two cores."""

import json

import pytest

from tests.integration.commands import call, run_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def finished(recipe, cwd):
    """What the recipe's command prints, and its metrics and proof."""
    code, out, err = call("train", f"recipe={recipe}", cwd=cwd, OMP_NUM_THREADS="2")
    assert code == 0, err
    folder = run_folders(cwd)[0]
    return out, *(
        json.loads((folder / file).read_text()) for file in ("metrics.json", "export/proof.json")
    )


def accuracies(metrics):
    return [metrics[who]["quality"]["accuracy"]["value"] for who in ("teacher", "student")]


def test_the_main_recipe_keeps_its_promise(tmp_path):
    out, metrics, proof = finished("bert_to_distil", tmp_path)
    teacher, student = accuracies(metrics)
    assert teacher > 0.85
    # The README's figure is a mean over seeds; one seed on another machine may differ a little.
    assert student > 0.97 * teacher
    assert proof["agreement"] == 1
    assert proof["ratio"] < 0.8
    assert "student" in out


def test_the_compressed_recipe_keeps_its_promise(tmp_path):
    """An eighth of the teacher's bytes, at 97 % of its accuracy."""
    _, metrics, proof = finished("bert_prune_quantize", tmp_path)
    teacher, student = accuracies(metrics)
    assert student >= 0.97 * teacher
    assert proof["agreement"] == 1
    assert proof["ratio"] <= 1 / 8
    assert metrics["dense"]["cost"]["disk_bytes"] > 4 * metrics["student"]["cost"]["disk_bytes"] > 0
