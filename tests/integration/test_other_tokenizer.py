"""Language models of different tokenizers: a student learns from spans of the same bytes."""

import json
import math
from dataclasses import replace

import pytest
import torch

from distill import isolated, models, student, teacher
from distill.errors import UserError
from distill.module import Distillation
from distill.prepare import prepare_run
from distill.recipe import config
from distill.tasks import CausalLanguageModelling
from distill.train import train
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, tiny, world

TASK = CausalLanguageModelling(max_length=128)


@pytest.fixture(scope="module")
def folders(_module_store, tmp_path_factory):
    """A teacher and a student with tokenizers of other sizes, both random."""
    texts = world(**LANGUAGE).raw["train"]["text"]
    made = {}
    for name, size, layers in (("teacher", 300, 2), ("student", 420, 1)):
        tokenizer = models.train_tokenizer(texts, size, TASK.special_tokens())
        torch.manual_seed(size)
        settings = LANGUAGE["teacher"]["config"] | {"n_layer": layers, "n_positions": 140}
        model = models.load(None, settings, TASK, name, tokenizer)
        made[name] = tmp_path_factory.mktemp("models") / name
        models.save(model, tokenizer, made[name])
    return made


def recipe(folders, divergence, **changes):
    length = {"task": LANGUAGE["task"] | {"max_length": 128}}
    return tiny(
        **LANGUAGE
        | length
        | {
            "tokenizer": {"vocab_size": None},
            "teacher": {"model": str(folders["teacher"]), "config": None, "outputs": "online"},
            "student": {"model": str(folders["student"]), "layers": None},
            "loss": {"divergence": divergence, "temperature": 1.0, "alpha": 0.0},
            "export": {"smaller": False, "examples": 20},
        }
        | changes
    )


@pytest.mark.parametrize("divergence", ["span_kl", "uld"])
def test_batches_hold_the_same_spans_and_the_loss_falls(folders, divergence):
    run = recipe(folders, divergence)
    prepared = prepare_run(run)
    frozen = models.load(str(folders["teacher"]), None, TASK, "teacher").eval()
    prepared = teacher.with_outputs(run, prepared, frozen)
    built, classes = student.build_student(run.student, prepared, frozen)
    assert classes is None
    module = Distillation(prepared.task, built, frozen, run.loss, config.Optimizer(), 1).eval()
    batch = loader(prepared)
    other = batch.for_teacher()
    assert len(batch.spans) == len(batch.labels)
    assert len(other.spans) == len(other.labels) != len(batch.labels)
    assert batch.spans.unique().tolist() == other.spans.unique().tolist()
    optimizer = torch.optim.Adam(built.parameters(), 1e-2)
    values = []
    for _ in range(30):
        value = module.parts(batch)["divergence"]
        values.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert math.isfinite(values[0])
    assert values[-1] < 0.7 * values[0]


def loader(prepared):
    from distill import data

    made = data.make_loader(
        prepared.examples["train"],
        prepared.task,
        prepared.tokenizer.pad_token_id,
        data.Batching(8),
        teacher_pad_id=prepared.for_teacher().tokenizer.pad_token_id,
    )
    return next(iter(made))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {}}, "the vocabularies of student and teacher differ"),
        (
            {"task": LANGUAGE["task"] | {"max_length": 8}},
            "task.max_length is 8",
        ),
        (
            {"teacher": {"outputs": "cached"}},
            "but teacher.outputs is cached",
        ),
        ({"loss": {"on_policy": 0.5}}, "loss.on_policy is 0.5"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(folders, changes, message):
    base = {
        "teacher": {"model": str(folders["teacher"]), "config": None, "outputs": "online"},
        "loss": {"divergence": "uld", "temperature": 1.0, "alpha": 0.0},
    }
    merged = {key: base.get(key, {}) | value for key, value in changes.items()}
    if changes == {"loss": {}}:
        merged["loss"] = {"alpha": 0.5}
    with pytest.raises(UserError, match=message):
        prepare_run(recipe(folders, "uld", **merged))


def test_one_tokenizer_needs_no_spans(folders):
    run = recipe(folders, "uld")
    same = replace(run.student, model=str(folders["teacher"]))
    with pytest.raises(UserError, match="loss.divergence is uld"):
        prepare_run(replace(run, student=same))


@pytest.mark.slow
def test_a_whole_run(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", run_here)
    metrics = train(recipe(folders, "uld"), tmp_path)
    assert metrics["teacher"]["quality"]["bits_per_byte"]
    assert metrics["student"]["quality"]["bits_per_byte"]
    assert json.loads((tmp_path / "export" / "proof.json").read_text())["agreement"] == 1
