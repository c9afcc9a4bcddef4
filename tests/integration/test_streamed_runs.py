"""Runs with `data.streaming`: killed and continued, on one process and on two; refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distill import models, student, teacher
from distill.errors import UserError
from distill.prepare import prepare_run
from distill.recipe import compose
from distill.stages import Stages
from distill.train import train
from distill.training import checkpoints
from distill.training.loggers import Tracker
from tests.integration.commands import call
from tests.unit.test_streams import folder_of, text
from tests.worlds import LLAMA, tiny

SHORT = {"max_steps": 6, "validations": 2, "accumulate": 2, "checkpoint": {"steps": 1}}
SIZES = (70, 40, 60)


@pytest.fixture
def source(tmp_path):
    """A folder of shards and a folder of a tokenizer."""
    folder = folder_of(tmp_path / "shards", "parquet", SIZES)
    texts = [text(shard, row) for shard in range(3) for row in range(40)]
    tokenizer = models.train_tokenizer(texts, 300, {"pad_token": "<pad>", "eos_token": "<eos>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return folder


def run_of(source, **changes):
    data = {
        "source": str(source),
        "label": None,
        "validation": None,
        "test": None,
        "streaming": True,
        "packing": True,
        "stream_buffer": 8,
        "stream_holdout": 12,
        "batch_size": 8,
    }
    sections = {
        "data": data | changes.pop("data", {}),
        "tokenizer": {"model": str(source.parent / "tokenizer"), "vocab_size": None},
        "trainer": SHORT | changes.pop("trainer", {}),
        "export": {"format": None},
    }
    return tiny(**LLAMA | sections | changes)


class Plug(BaseException):
    """Pulled."""


def trained(run, folder):
    """The weights after the student stage."""
    prepared = prepare_run(run)
    torch.manual_seed(0)
    model = models.load(None, run.teacher.config, prepared.task, "teacher", prepared.tokenizer)
    prepared = teacher.with_outputs(run, prepared, model)
    with Stages()("student"):
        student.train_student(run, prepared, model, [], folder, Tracker(run, folder))
    return load_file(folder / "student/model.safetensors")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(source, tmp_path, monkeypatch, workers):
    run = run_of(source, data={"workers": workers})
    complete = trained(run, tmp_path / "complete")
    seen = checkpoints.PerBatchSeed.on_train_batch_start
    for step in (1, 4):

        def pulled(self, trainer, *rest, step=step):
            if trainer.global_step == step:
                raise Plug
            seen(self, trainer, *rest)

        with monkeypatch.context() as patch, pytest.raises(Plug):
            patch.setattr(checkpoints.PerBatchSeed, "on_train_batch_start", pulled)
            trained(run, tmp_path / "cut")
    resumed = trained(run, tmp_path / "cut")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in complete.items())


def test_a_longer_run_goes_on_from_the_last_step(source, tmp_path):
    complete = trained(
        run_of(source, optimizer={"schedule": "constant", "warmup": 0}), tmp_path / "a"
    )
    for steps in (3, 6):
        optimizer = {"schedule": "constant", "warmup": 0}
        run = run_of(source, trainer={"max_steps": steps}, optimizer=optimizer)
        longer = trained(run, tmp_path / "b")
    assert all(torch.equal(longer[name], tensor) for name, tensor in complete.items())


def test_what_reads_all_texts_is_refused_before_training(source, tmp_path):
    trim = {"_target_": "distill.callbacks.TrimVocabulary"}
    with pytest.raises(UserError, match="data.streaming is true, but trim"):
        train(run_of(source, callbacks={"trim": trim}), tmp_path / "run")
    classes = {"_target_": "distill.tasks.SingleLabelClassification"}
    with pytest.raises(UserError, match="data.streaming is true, but SingleLabelClassification"):
        prepare_run(run_of(source, task=classes))


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_go_on_from_a_step_end_with_the_same_bytes(source, tmp_path):
    run = run_of(source, trainer={"devices": 2})
    compose.save_recipe(run, tmp_path / "recipes" / "streamed.yaml")
    ends = {}
    for name, stops in (("complete", ()), ("cut", (3,))):
        folder = tmp_path / name
        for steps in (*stops, 6):
            code, _, err = call(
                "train",
                "recipe=streamed",
                f"hydra.run.dir={folder}",
                f"trainer.max_steps={steps}",
                "optimizer.schedule=constant",
                "optimizer.warmup=0",
                cwd=tmp_path,
            )
            assert code == 0, err[-2000:]
        ends[name] = load_file(folder / "student/model.safetensors")
        assert json.loads((folder / "metrics.json").read_text())["training"]["steps"] == 6
    for name, tensor in ends["complete"].items():
        assert torch.equal(ends["cut"][name], tensor)
