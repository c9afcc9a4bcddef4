"""Resolves a recipe's `auto` for this device."""

import logging
from dataclasses import replace

import torch

from distill import models
from distill.errors import UserError
from distill.recipe import config

log = logging.getLogger(__name__)


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
    """The Trainer's precision; `auto` is bf16-mixed on devices that compute in bfloat16.

    Lightning has no gradient scaler on CPUs and trains in bfloat16 there in place of float16.
    """
    if trainer.precision == "16-mixed" and models.resolve_device(trainer) == "cpu":
        return "bf16-mixed"
    if trainer.precision != "auto":
        return trainer.precision
    return "bf16-mixed" if models.supports_bf16(trainer) else "32-true"


def resolve_auto(run: config.Run) -> config.Run:
    """Replace `auto` by its value here, because a run may be resumed on another device."""
    teacher = run.teacher
    if teacher is not None:
        teacher = replace(teacher, dtype=models.resolve_teacher_dtype(teacher, run.trainer))
    precision, recipe = resolve_precision(run.trainer), run.trainer.precision
    if recipe not in ("auto", precision):
        log.warning("trainer.precision is %s, which CPUs lack: %s is used", recipe, precision)
    trainer = replace(run.trainer, precision=precision)
    export = models.resolve_export_dtype(run.export, run.teacher, run.student)
    return replace(run, teacher=teacher, trainer=trainer, export=export)
