"""The loss of one micro-batch whose teacher has another tokenizer.

N = rows of the student, M = rows of the teacher, S = spans of the same bytes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.losses import chunked
from distill.losses.spans import SpanRows
from distill.recipe import config
from distill.tasks.batch import Batch


def sum_span_losses(
    rows: tuple[chunked.LogitRows, chunked.LogitRows],
    batch: Batch,
    label_loss: Callable[[Tensor, Tensor], Tensor],
    divergence: Callable[[SpanRows, SpanRows, float], Tensor],
    loss: config.Loss,
) -> Tensor:
    """Loss, supervised part and divergence, summed over rows and spans, (3,).

    Args:
        rows: Logits of student and teacher, (N, C) and (M, C').
        batch: The batch, with spans for both.
        label_loss: Loss of each row against its label.
        divergence: One of `distill.losses.SPANS`.
        loss: Its alpha and temperature.
    """
    student_NC, teacher_MC = (chunked.full_logits(each) for each in rows)
    other = batch.for_teacher()
    assert batch.spans is not None and other.spans is not None
    supervised = label_loss(student_NC, batch.labels).sum()
    divergence_S = divergence(
        SpanRows(student_NC, batch.labels, batch.spans),
        SpanRows(teacher_MC, other.labels, other.spans),
        loss.temperature,
    )
    diverged = divergence_S.sum()
    return torch.stack(
        [loss.alpha * supervised + (1 - loss.alpha) * diverged, supervised, diverged]
    )
