"""The adapter of a training: put beside the student's weights, then written and merged."""

import logging
from pathlib import Path

from transformers import PreTrainedModel

from distill import models, store
from distill.models import adapters, frozen_weights
from distill.processes import fsdp, ranks
from distill.recipe import config
from distill.training.hardware import resolve_precision

log = logging.getLogger(__name__)


def attach_adapter(
    student: PreTrainedModel, lora: config.Lora, trainer: config.Trainer, is_teacher: bool = False
) -> None:
    """Freeze the student, which may be its own teacher, and put an adapter beside its layers."""
    before = student.num_parameters()
    # FSDP shards weights of one dtype only.
    low_precision = resolve_precision(trainer) == "bf16-mixed" and not fsdp.uses_fsdp(trainer)
    adapters.attach(student, lora, low_precision, is_teacher)
    trained = student.num_parameters(only_trainable=True)
    log.info(
        "an adapter of rank %d trains %d parameters beside %d; the weights take %.1f MB",
        lora.rank,
        trained,
        before,
        frozen_weights.weight_memory(student) / 1e6,
    )


def merge_adapter(student: PreTrainedModel, base: str | None, folder: Path) -> None:
    """Write the adapter, beside the student that it is merged into.

    Args:
        student: Changed in place.
        base: `student.model`; None: no adapter is written.
        folder: The run folder.
    """
    if ranks.is_rank_zero() and base is not None and student.get_output_embeddings() is not None:
        with store.write_entry(folder / adapters.FOLDER) as inside:
            write_adapter(student, base, inside)
    adapters.merge(student)


def write_adapter(student: PreTrainedModel, base: str | None, folder: Path) -> None:
    """Write the adapter as peft stores it.

    Args:
        student: Has the adapter.
        base: `student.model`; None: the student has layers of its teacher.
        folder: Written.
    """
    path = None if base is None else models.resolve_path(base, "student.model")
    adapters.save_adapter(student, path, folder)
