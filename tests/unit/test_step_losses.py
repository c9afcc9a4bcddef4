"""Losses stay on the device until a step is logged; the first that is not finite is named."""

import math
import re

import pytest
import torch

from distill.errors import RunFailed
from distill.module.step_losses import STUDENT, TEACHER, StepLosses, peak
from tests.unit.test_module import fitted, module_of
from tests.worlds import Rows, world

FINE = {"loss": 2.0, "supervised": 1.0, "divergence": 3.0, "hidden": 0.5}


@pytest.fixture(scope="module")
def small(_module_store):
    return world()


def added(losses, step, peaks=(1.0, 2.0), **changed):
    parts = {name: torch.tensor(value) for name, value in (FINE | changed).items()}
    losses.add(parts, map(torch.tensor, peaks), step)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"loss"}, "loss"),
        ({"loss", "supervised"}, "supervised"),
        ({"loss", "divergence"}, "divergence"),
        ({"loss", "hidden"}, "hidden"),
        ({"loss", "divergence", STUDENT}, STUDENT),
        ({"loss", "divergence", STUDENT, TEACHER}, TEACHER),
    ],
)
def test_the_first_step_and_its_cause_are_found(value, changes, cause):
    losses = StepLosses()
    added(losses, 1)
    assert losses.first_not_finite() is None
    for step in (2, 2, 3):
        added(losses, step)
    peaks = tuple(value if name in changes else 1.0 for name in (STUDENT, TEACHER))
    added(losses, 3, peaks, **dict.fromkeys(changes & FINE.keys(), value))
    added(losses, 4, loss=math.nan, supervised=math.nan)
    found = losses.first_not_finite()
    assert (found.step, found.part) == (3, cause)
    assert found.value == value or (math.isnan(value) and math.isnan(found.value))
    assert losses.first_not_finite() is None


def test_losses_are_summed_over_the_micro_batches_of_a_step():
    losses = StepLosses()
    assert losses.last_step() == {}
    for step in (1, 1, 2, 2, 2):
        if step == 2 and losses.last_step() == {}:
            losses.end_step()
        added(losses, step)
    assert losses.last_step()["train/divergence"] == 6
    assert not losses.complete
    losses.end_step()
    assert losses.complete
    assert {name: float(value) for name, value in losses.last_step().items()} == {
        f"train/{name}": 3 * value for name, value in FINE.items()
    }


def test_a_mask_of_the_vocabulary_is_no_fault_and_nan_among_logits_is():
    like = torch.zeros(3)
    assert peak(torch.tensor([[1.0, -math.inf]]), like) == 1
    assert math.isnan(peak(torch.tensor([[1.0, math.nan]]), like))
    assert peak(None, like) == peak(torch.zeros(0, 3), like) == 0


def broken(made, path, fault, steps, **trainer):
    """A training whose models break at a step, up to the error; the steps that were logged."""
    module, rows = module_of(made, alpha=0.5), Rows()
    calls = [0]

    def break_logits(model, inputs, output):
        calls[0] += model.training or fault is module.teacher
        if calls[0] >= steps:
            output.logits = output.logits * math.nan

    fault = module.teacher if fault == "teacher" else module.student
    fault.register_forward_hook(break_logits)
    with pytest.raises(RunFailed) as error:
        fitted(made, path, module, [], [rows], **{"max_steps": 80, "validations": 1} | trainer)
    return str(error.value), [row["step"] for row in rows.rows]


def test_the_error_names_student_and_step_at_the_next_logged_step(small, tmp_path):
    message, logged = broken(small, tmp_path, "student", steps=6)
    assert re.match(r"optimizer\.lr is 0\.001, .*student's logits of step 6 .* nan", message)
    assert logged == [3]  # steps 4 and 8 are logged


def test_a_teacher_s_fault_is_not_the_learning_rate_s(small, tmp_path):
    message, _ = broken(small, tmp_path, "teacher", steps=2)
    assert re.match(r"the teacher's logits of step 2 .* nan, .*teacher\.dtype=float32", message)


def test_no_checkpoint_holds_weights_after_a_loss_that_is_not_finite(small, tmp_path):
    from distill.recipe import config

    message, _ = broken(
        small, tmp_path, "student", 6, checkpoint=config.Checkpoint(steps=1, keep=9)
    )
    assert "step 6" in message
    saved = sorted(file.name for file in tmp_path.glob("*.ckpt"))
    assert saved and saved[-1] < "step-00000006"
