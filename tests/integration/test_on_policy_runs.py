"""Runs in which the student writes: interrupted ones end with the same bytes, also on two ranks."""

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill import models, student
from distill.processes import ranks
from distill.recipe import config
from distill.training import checkpoints, on_policy
from distill.training.loggers import Tracker
from tests.processes import on_ranks
from tests.techniques import RAMP, technique
from tests.worlds import LLAMA, callbacks_of, world

COMPRESSED = {
    "neurons": technique("PruneNeurons", amount=0.5, **RAMP),
    "quantize": technique("Quantize", bits=8, start=0.6),
}


class Interrupted(BaseException):
    """Raised at the start of a step."""


def prepared(**loss):
    """A world of some prompts, with steps of several micro-batches, some with fewer examples."""
    with ranks.rank_zero_first():
        made = world(
            **LLAMA | {"student": {"layers": [0, 2]}},
            loss={"on_policy": 0.5, "completion_tokens": 6} | loss,
            trainer={"max_steps": 9, "validations": 3, "checkpoint": {"steps": 2}, "accumulate": 2},
        )
    made.examples["train"] = made.examples["train"].select(range(9 * 4 + 1))
    made.examples["validation"] = made.examples["validation"].select(range(8))
    made.run.data = replace(made.run.data, batch_size=8)
    return made


def with_adapter(made, folder):
    """The same run, of packed batches and an adapter; without it, the student is its teacher."""
    if ranks.is_rank_zero():
        models.save(made.model(), made.tokenizer, folder)
    ranks.barrier()
    made.run.data.packing = True
    made.run.teacher = replace(
        made.run.teacher, config=None, model=str(folder), outputs="base", dtype="auto"
    )
    lora = config.Lora(rank=4, dropout=0.1)
    made.run.student = replace(made.run.student, layers=None, model=str(folder), lora=lora)
    return made


def trained(made, folder, compressed=False):
    """Checksum of the student's weights after a training in a folder, which may go on there."""
    run = replace(made.run, callbacks=COMPRESSED if compressed else {})
    tracker = Tracker(run, folder)
    built = callbacks_of(run, made)
    torch.manual_seed(0)
    spec = run.teacher
    teacher = models.load(spec.model, spec.config, made.task, "teacher", made.tokenizer)
    teacher.requires_grad_(False)
    student.train_student(run, made.prepared, teacher, built, folder, tracker)
    ranks.barrier()
    return hashlib.sha256((folder / "student" / "model.safetensors").read_bytes()).hexdigest()


def interrupted(made, folder, step, compressed=False):
    """The same, of a training that is interrupted at the start of a step."""
    batch_start = checkpoints.PerBatchSeed.on_train_batch_start

    def raising(self, trainer, *rest):
        if trainer.global_step == step:
            raise Interrupted
        batch_start(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoints.PerBatchSeed, "on_train_batch_start", raising)
        trained(made, folder, compressed)
    assert list(folder.glob("checkpoints/*.ckpt"))
    return trained(made, folder, compressed)


def ends(folder):
    """Checksums of the weights after a complete training and after an interrupted one."""
    made = prepared()
    results = [trained(made, folder / "complete"), interrupted(made, folder / "interrupted", 7)]
    if importlib.util.find_spec("peft") is None:
        return results, []
    adapted = with_adapter(prepared(), folder / "base")
    return results, [
        trained(adapted, folder / "adapted"),
        interrupted(adapted, folder / "adapted, interrupted", 5),
    ]


def test_an_interrupted_run_writes_the_same_and_ends_with_the_same_bytes(tmp_path):
    made = prepared()
    complete = trained(made, tmp_path / "complete")
    assert interrupted(made, tmp_path / "interrupted", 7) == complete


@pytest.mark.slow
def test_an_interrupted_run_of_two_ranks_ends_with_the_same_bytes(tmp_path):
    plain, adapted = zip(*on_ranks(ends, tmp_path, 2), strict=True)
    assert len({each for rank in plain for each in rank}) == 1
    assert len({each for rank in adapted for each in rank}) <= 1


@pytest.mark.slow
@pytest.mark.long
def test_packed_batches_and_an_adapter_end_with_the_same_bytes(tmp_path):
    pytest.importorskip("peft")
    made = with_adapter(prepared(on_policy=1.0), tmp_path / "base")
    complete = trained(made, tmp_path / "complete")
    assert interrupted(made, tmp_path / "interrupted", 5) == complete


@pytest.mark.slow
def test_a_student_that_is_compressed_while_it_writes_ends_with_the_same_bytes(tmp_path):
    made = prepared(on_policy=1.0)
    complete = trained(made, tmp_path / "complete", compressed=True)
    for step in (3, 6):
        folder: Path = tmp_path / f"interrupted {step}"
        assert interrupted(made, folder, step, compressed=True) == complete


def test_a_share_of_zero_is_exactly_the_off_policy_training(tmp_path, monkeypatch):
    off = trained(prepared(on_policy=0.0), tmp_path / "off")
    # Without the feature: nothing is installed, and the keys have other values.
    monkeypatch.setattr(on_policy, "install", lambda *_: None)
    settings = {"on_policy": 0.5, "completion_tokens": 3, "sampling_temperature": 0.1}
    assert trained(prepared(**settings), tmp_path / "without") == off
