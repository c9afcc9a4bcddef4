"""The loss of a language model from its last hidden states, some rows at a time: no tensor of (N, V) logits is ever whole.

    logits = hidden @ weight^T + bias,   d hidden = G @ weight,   d weight = G^T @ hidden,   G = d loss / d logits

G of a chunk is formed right after its logits, in their place, and used up before the next chunk: what a backward pass would need
is then there already, and memory does not grow with N * V. The values and gradients are those of the whole, to rounding.

N = rows that count, V = vocabulary, D = width, n = rows of a chunk, K = numbers that a loss consists of.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = (
    1 << 25
)  # bytes of a chunk's logits in float32: enough rows for a matrix product to be efficient
SHARE, LEAST = (
    16,
    64,
)  # where all logits do not fit: at most a sixteenth of the rows, for a chunk to be small beside them, or 64
ROW = (
    1 << 20
)  # bytes of those that pass through the loss together: a processor's cache holds what lies between its steps
BLOCK = 4096  # rows of a head's gradient that a low precision computes at a time, before they are added in float32

LossSums = Callable[
    ..., Tensor
]  # (student_nV, teacher_nV or None, *columns_n) -> (K,), of which the first is the loss


class FactoredLogits(NamedTuple):
    """Rows of logits, as the two factors that they are the product of."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def logits(self) -> Tensor:
        """All of them, (N, V)."""
        return F.linear(*self)


LogitRows = FactoredLogits | Tensor


def sum_in_chunks(
    sums: LossSums,
    student: LogitRows,
    teacher: LogitRows | None = None,
    columns: tuple[Tensor, ...] = (),
    rows: int | None = None,
) -> Tensor:
    """`sums` over all rows, (K,). From factors they are added up chunk by chunk, and only the first of the K numbers has a gradient.

    `sums` must be a sum over rows. The teacher is given by factors of its own, by its logits, or not at all; `columns` are labels and
    the like, with a first dimension of N. `rows` of a chunk; null: at most MATRIX bytes of logits.
    """
    if isinstance(student, FactoredLogits) and _dtype(student) == torch.float16:
        student = (
            student.logits()
        )  # a gradient scaler's factor must come before gradients in float16 are formed
    if isinstance(student, Tensor):
        return sums(
            student,
            None if teacher is None else _wide(teacher_chunk(teacher, slice(None))),
            *columns,
        )
    rows = rows or _suited(len(student.hidden_ND), len(student.weight_VD))
    factors = (
        student
        if torch.is_grad_enabled()
        else (None if tensor is None else tensor.detach() for tensor in student)
    )
    loss, others = _Summed.apply(sums, teacher, columns, rows, *factors)
    return torch.cat([loss[None], others])


def _suited(rows: int, width: int) -> int:
    most = rows_within(width, CHUNK_BYTES)
    return most if rows <= most else min(most, max(LEAST, rows // SHARE))


def rows_within(width: int, size: int) -> int:
    """Rows of so many float32 numbers in that many bytes, one at the least."""
    return max(1, size // (4 * width))


def chunk_slices(rows: int, size: int) -> Iterator[slice]:
    """0..rows in slices of `size`; an empty one of no rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def teacher_chunk(teacher: LogitRows, part: slice) -> Tensor:
    """Some rows of a teacher's logits, in its own precision, whatever autocast says."""
    if isinstance(teacher, FactoredLogits):
        with torch.no_grad(), torch.autocast(teacher.hidden_ND.device.type, enabled=False):
            return teacher._replace(hidden_ND=teacher.hidden_ND[part]).logits()
    return teacher[part]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Summed(torch.autograd.Function):
    """See :func:`summed`: the forward forms the gradients, the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        sums: LossSums,
        teacher: Any,
        columns: Any,
        rows: int,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[4:]
        tensors = (hidden_ND, weight_VD, bias_V)
        gradients = [
            _zeros(tensor) if tensor is not None and need else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        student = _cast(FactoredLogits(*tensors))
        total: Any = 0
        for part in chunk_slices(len(hidden_ND), rows):
            logits_nV = student._replace(hidden_ND=student.hidden_ND[part]).logits()
            taught_nV = None if teacher is None else teacher_chunk(teacher, part)
            total = total + _differentiated(
                sums, logits_nV, taught_nV, tuple(column[part] for column in columns), any(needed)
            )
            _accumulate(gradients, logits_nV, student, part)
        ctx.gradients = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip(gradients, tensors, strict=True)
        ]
        loss, others = total[0], total[1:]
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients, ctx.gradients = (
            ctx.gradients,
            None,
        )  # as large as the head: they are scaled in place, once
        return (None,) * 4 + tuple(
            None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients
        )


def _cast(factors: FactoredLogits) -> FactoredLogits:
    """The factors in the type in which autocast multiplies, converted once for all chunks."""
    hidden_ND, weight_VD, bias_V = factors
    dtype = _dtype(factors)
    return FactoredLogits(
        hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    )


def _dtype(factors: FactoredLogits) -> torch.dtype:
    """The type in which they are multiplied."""
    device, dtype = factors.hidden_ND.device.type, factors.weight_VD.dtype
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and dtype != torch.float64
        else dtype
    )


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _differentiated(
    sums: LossSums,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    columns: tuple[Tensor, ...],
    wanted: bool,
) -> Tensor:
    """The sums of a chunk; where a gradient is wanted, that of the loss takes the place of the student's logits."""
    total: Any = 0
    size = (
        ROW if student_nV.device.type == "cpu" else CHUNK_BYTES
    )  # a GPU would rather have one large piece of work
    for part in chunk_slices(len(student_nV), rows_within(student_nV.shape[1], size)):
        taught_nV, mine = (
            None if teacher_nV is None else _wide(teacher_nV[part]),
            tuple(column[part] for column in columns),
        )
        with torch.set_grad_enabled(wanted):
            logits_nV = student_nV[part].detach().requires_grad_(wanted)
            values_K = sums(logits_nV, taught_nV, *mine)
            if wanted:
                student_nV[part] = torch.autograd.grad(values_K[0], logits_nV)[0]
        total = total + values_K.detach()
    return total


def _accumulate(
    gradients: list[Tensor | None], loss_nV: Tensor, student: FactoredLogits, part: slice
) -> None:
    """Add a chunk's share to the gradients of hidden states, weight and bias."""
    hidden_ND, weight_VD, bias_V = gradients
    if hidden_ND is not None:
        hidden_ND[part] = loss_nV @ student.weight_VD
    if weight_VD is not None and loss_nV.dtype == weight_VD.dtype:
        weight_VD.addmm_(loss_nV.T, student.hidden_ND[part])
    elif weight_VD is not None:
        for block in chunk_slices(len(weight_VD), BLOCK):
            weight_VD[block] += loss_nV[:, block].T @ student.hidden_ND[part]
    if bias_V is not None:
        bias_V += loss_nV.sum(0, dtype=bias_V.dtype)
