"""An online teacher with fewer bits per weight, and what that changes in its outputs."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from distill import models
from distill.losses import chunked
from distill.models.frozen_weights import quantize_blocks, weight_memory
from distill.tasks.base import Task
from distill.tasks.batch import Batch

log = logging.getLogger("distill")

ROWS = 64  # rows of logits that are compared, of each batch


class QuantizationError(NamedTuple):
    """How far the outputs of a quantized teacher are from those of the plain one."""

    rows: int
    agreement: float  # share of rows with the same largest logit
    divergence: float  # mean over the rows
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def quantize_teacher(
    teacher: PreTrainedModel,
    mode: str,
    task: Task,
    batches: Iterable[Batch],
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> QuantizationError:
    """Store the weights of a teacher's blocks in fewer bits, and measure what that changes.

    Args:
        teacher: changed in place, on the device that holds it.
        mode: `teacher.quantize`.
        task: selects the rows of logits.
        batches: of the teacher's inputs.
        divergence: (quantized_NC, plain_NC) -> divergence_N.
    """
    batches = [move_data_to_device(batch, teacher.device) for batch in batches]
    plain, before = _rows(teacher, task, batches), weight_memory(teacher)
    quantize_blocks(teacher, mode)
    quantized = _rows(teacher, task, batches)
    same = [
        (one_NC.argmax(-1) == other_NC.argmax(-1)).float()
        for one_NC, other_NC in zip(quantized, plain, strict=True)
    ]
    divergences = [
        divergence(one_NC, other_NC) for one_NC, other_NC in zip(quantized, plain, strict=True)
    ]
    error = QuantizationError(
        rows=sum(map(len, same)),
        agreement=float(torch.cat(same).mean()),
        divergence=float(torch.cat(divergences).mean()),
        bytes_before=before,
        bytes_after=weight_memory(teacher),
    )
    log.info(
        "the teacher takes %.1f MB in %s, and took %.1f: on %d rows, %.1f %% of its predictions "
        "are the same, and the divergence from it is %.2g",
        error.bytes_after / 1e6,
        mode,
        error.bytes_before / 1e6,
        error.rows,
        100 * error.agreement,
        error.divergence,
    )
    return error


def _rows(teacher: PreTrainedModel, task: Task, batches: Iterable[Batch]) -> list[Tensor]:
    """Some rows of logits of each batch, in float32."""
    factors = task.selects_positions and models.has_linear_head(teacher)
    selected = []
    for batch in batches:

        def select(positions: Tensor, batch: Batch = batch) -> Tensor:
            return task.select_rows(positions, batch)[:ROWS]

        rows = models.logit_rows(teacher, batch.inputs, select, None, factors)
        selected.append(chunked.full_logits(rows).float())
    return selected
