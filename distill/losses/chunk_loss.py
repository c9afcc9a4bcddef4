"""The loss of one chunk of logits, and its gradient, by a kernel or by autograd.

n = rows of the chunk, V = vocabulary, K = number of summed values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses import fused
from distill.losses.chunk_sizes import bytes_per_call, chunk_slices, device_memory, rows_within
from distill.losses.fused import FusedLoss
from distill.losses.products import Products, at_least_float32

# (student_nV, teacher_nV or None, *columns_n) -> (K,), sums over rows; the first is the loss.
LossSums = Callable[..., Tensor]


class ChunkLoss(NamedTuple):
    """A loss that is called on one chunk of rows after the other.

    Args:
        sums: The loss.
        loss: The same for a GPU's kernel; None if there is none.
        teacher: A slice of rows -> the teacher's logits; None if the loss needs none.
        columns: Labels and other inputs of all rows.
        products: The products that need the gradient.
        needs_gradient: Whether to compute it.
    """

    sums: LossSums
    loss: FusedLoss | None
    teacher: Callable[[slice], Tensor] | None
    columns: tuple[Tensor, ...]
    products: Products
    needs_gradient: bool

    def __call__(self, logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Sums of the rows, (K,), and the gradient as a factor, (n, V).

        Args:
            logits_nV: The student's logits, which may be overwritten.
            part: The rows.
        """
        if self.loss is not None and has_kernel(self.loss, logits_nV, self.products):
            return self._by_kernel(self.loss, logits_nV, part)
        return self._by_autograd(logits_nV, part)

    def _by_kernel(self, loss: FusedLoss, logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        teacher_nV = None if self.teacher is None else self.teacher(part)
        gradient_nV = logits_nV
        if self.needs_gradient and self.products.gradient_dtype != logits_nV.dtype:
            gradient_nV = torch.empty_like(logits_nV, dtype=self.products.gradient_dtype)
        values_3 = fused.sums_and_gradient(
            loss,
            logits_nV,
            teacher_nV,
            self.columns[0][part],
            gradient_nV if self.needs_gradient else None,
            self.products.scale,
        )
        return values_3, gradient_nV

    def _by_autograd(self, logits_nV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        teacher_nV = None if self.teacher is None else self.teacher(part)
        columns = tuple(column[part] for column in self.columns)
        values_K = self._replace_by_gradient(logits_nV, teacher_nV, columns)
        if not self.needs_gradient:
            return values_K, logits_nV
        return values_K, self.products.gradient_factor(logits_nV)

    def _replace_by_gradient(
        self, logits_nV: Tensor, teacher_nV: Tensor | None, columns: tuple[Tensor, ...]
    ) -> Tensor:
        """The sums; overwrites the student's logits with the gradient if it is needed."""
        total: Any = 0
        size = bytes_per_call(device_memory(logits_nV.device))
        for part in chunk_slices(len(logits_nV), rows_within(logits_nV.shape[1], size)):
            teacher_rows = None if teacher_nV is None else at_least_float32(teacher_nV[part])
            with torch.set_grad_enabled(self.needs_gradient):
                student_rows = logits_nV[part].detach().requires_grad_(self.needs_gradient)
                rows = (column[part] for column in columns)
                values_K = self.sums(student_rows, teacher_rows, *rows)
                if self.needs_gradient:
                    logits_nV[part] = torch.autograd.grad(values_K[0], student_rows)[0]
            total = total + values_K.detach()
        return total


def has_kernel(loss: FusedLoss, logits_nV: Tensor, products: Products) -> bool:
    """Whether a kernel computes the loss of these logits."""
    if logits_nV.device.type != "cuda" or logits_nV.dtype != torch.float32:
        return False
    aligned = logits_nV.shape[1] % 16 == 0
    return fused.is_exact(loss, logits_nV.device, products.gradient_dtype, aligned)
