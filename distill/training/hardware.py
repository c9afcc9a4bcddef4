"""Resolves a recipe's `auto` for this device."""

from dataclasses import replace

import torch

from distill import models
from distill.errors import UserError
from distill.recipe import config


def check_device(trainer: config.Trainer) -> None:
    """Check that there is a GPU if the recipe needs one.

    Raises:
        UserError: if there is none.
    """
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator is gpu, but no GPU can be used here: set "
            "trainer.accelerator=auto, or check its driver"
        )


def resolve_precision(trainer: config.Trainer) -> str:
    """The Trainer's precision; `auto` is bf16-mixed on devices that compute in bfloat16."""
    if trainer.precision != "auto":
        return trainer.precision
    return "bf16-mixed" if models.supports_bf16(trainer) else "32-true"


def resolve_auto(run: config.Run) -> config.Run:
    """Replace `auto` by its value here, because a run may be resumed on another device."""
    teacher = run.teacher
    if teacher is not None:
        teacher = replace(teacher, dtype=models.resolve_teacher_dtype(teacher, run.trainer))
    trainer = replace(run.trainer, precision=resolve_precision(run.trainer))
    return replace(run, teacher=teacher, trainer=trainer)
