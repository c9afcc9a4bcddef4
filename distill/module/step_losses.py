"""The losses of optimizer steps, which stay on the device until a step is logged.

K = values of a micro-batch: the parts of its loss, then the peaks of the logits.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses import chunked
from distill.processes import ranks

STUDENT, TEACHER = "student's logits", "teacher's logits"
PEAKS = (STUDENT, TEACHER)


class NotFinite(NamedTuple):
    """A value that is not finite."""

    step: int  # number of the optimizer step, from 1
    part: str  # a part of the loss, or one of PEAKS
    value: float


class StepLosses:
    """Sums the losses of an optimizer step, and keeps those of each micro-batch until a check.

    Nothing here but :meth:`last_step` and :meth:`first_not_finite` needs a value on the host, which
    would be a CPU-GPU sync point.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()  # of the parts of the loss
        self._sums_K: Tensor | None = None  # over the micro-batches of the current step
        self._last_K: Tensor | None = None  # of the last completed step
        # Micro-batches since the last check: the step of each, and its values.
        self._unchecked: list[tuple[int, Tensor]] = []

    def add(self, parts: Mapping[str, Tensor], peaks: Iterable[Tensor], step: int) -> None:
        """Add a micro-batch.

        Args:
            parts: The parts of its loss by name.
            peaks: The largest logits of the student and of the teacher, 0 if there are none.
            step: Number of the optimizer step, from 1.
        """
        self._names = tuple(parts)
        values_K = torch.stack([*(part.detach() for part in parts.values()), *peaks])
        self._sums_K = values_K if self._sums_K is None else self._sums_K + values_K
        self._unchecked.append((step, values_K))

    @property
    def complete(self) -> bool:
        """Whether all micro-batches added so far are of completed steps."""
        return self._sums_K is None

    def end_step(self) -> None:
        """End an optimizer step."""
        self._last_K, self._sums_K = self._sums_K, None

    def last_step(self) -> dict[str, Tensor]:
        """The losses of the last optimizer step, summed over all ranks, which must all call it.

        Empty before the first step.
        """
        if self._last_K is None:
            return {}
        parts = ranks.all_reduce_sum(self._last_K[: len(self._names)].float())
        return dict(zip((f"train/{name}" for name in self._names), parts, strict=True))

    def first_not_finite(self) -> NotFinite | None:
        """The first loss since the last call that is not finite; all ranks must call it."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return None
        steps, tensors = zip(*unchecked, strict=True)
        rows = torch.stack(tensors).tolist()
        # Causes first: the peaks cause the parts, whose sum is the loss.
        names = (*self._names, *PEAKS)
        mine = [
            NotFinite(step, name, value)
            for step, row in zip(steps, rows, strict=True)
            for name, value in [*zip(names, row, strict=True)][::-1]
            if not math.isfinite(value)
        ]
        return min(chain(*ranks.all_gather(mine[:1])), key=lambda each: each.step, default=None)


def peak(rows: chunked.LogitRows | None, like: Tensor) -> Tensor:
    """The largest logit, or number in their hidden states; NaN if there is one, 0 without rows."""
    tensor = rows.hidden_ND if isinstance(rows, chunked.FactoredLogits) else rows
    if tensor is None or not tensor.numel():
        return like.new_zeros(())
    return tensor.detach().amax()
