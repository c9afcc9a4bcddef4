"""The loss of a language model from its last hidden states, without storing all logits.

    logits = hidden @ weight^T + bias
    d loss / d hidden = G @ weight,  d loss / d weight = G^T @ hidden,  where G = d loss / d logits

The rows are processed in chunks. G of a chunk overwrites its logits, and is added to the gradients
before the next chunk is processed. So the forward pass computes the gradients too, and memory does
not grow with N * V. Values and gradients equal those of the full logits, up to rounding.

N = rows, V = vocabulary, D = width, n = rows of a chunk, K = number of summed values.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 1 << 25  # float32 logits of a chunk; enough rows for an efficient matrix product
# If not all logits fit into one chunk, a chunk has at most max(MIN_ROWS, 1 / SHARE of the rows), so
# that it needs little memory compared with all hidden states.
SHARE, MIN_ROWS = 16, 64
# Bytes of float32 logits per call of the loss on a CPU: intermediate results fit into its cache.
CACHE_BYTES = 1 << 20
# Rows of the head's gradient that are computed in low precision before they are added in float32.
BLOCK = 4096

# (student_nV, teacher_nV or None, *columns_n) -> (K,), sums over rows; the first is the loss.
LossSums = Callable[..., Tensor]


class FactoredLogits(NamedTuple):
    """Rows of logits in factored form: hidden states, and the head's weight and bias."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def logits(self) -> Tensor:
        """The product, (N, V)."""
        return F.linear(*self)


LogitRows = FactoredLogits | Tensor


class _Arguments(NamedTuple):
    """The arguments of a chunked loss besides the student's factors."""

    sums: LossSums
    teacher: LogitRows | None
    columns: tuple[Tensor, ...]
    rows: int


def sum_in_chunks(
    sums: LossSums,
    student: LogitRows,
    teacher: LogitRows | None = None,
    columns: tuple[Tensor, ...] = (),
    rows: int | None = None,
) -> Tensor:
    """Sum a loss over all rows.

    Args:
        sums: Computes K values of some rows, each a sum over the rows.
        student: Factors, which are processed in chunks, or logits, which are processed at once.
        teacher: Factors or logits; None if the loss needs no teacher.
        columns: Labels and other inputs per row, (N, ...).
        rows: Rows of a chunk; None chooses them, with at most CHUNK_BYTES of logits.

    Returns:
        (K,). From factors, only the first value has a gradient.
    """
    if isinstance(student, FactoredLogits) and _matmul_dtype(student) == torch.float16:
        # A gradient scaler must scale the loss before float16 gradients are computed.
        student = student.logits()
    if isinstance(student, Tensor):
        return sums(student, None if teacher is None else full_logits(teacher), *columns)
    rows = rows or _choose_rows(len(student.hidden_ND), len(student.weight_VD))
    factors = (
        student
        if torch.is_grad_enabled()
        else (None if tensor is None else tensor.detach() for tensor in student)
    )
    loss, others = _ChunkedSum.apply(_Arguments(sums, teacher, columns, rows), *factors)
    return torch.cat([loss[None], others])


def _choose_rows(rows: int, width: int) -> int:
    most = rows_within(width, CHUNK_BYTES)
    return most if rows <= most else min(most, max(MIN_ROWS, rows // SHARE))


def rows_within(width: int, size: int) -> int:
    """Rows of `width` float32 numbers that fit into `size` bytes, at least 1."""
    return max(1, size // (4 * width))


def chunk_slices(rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover all rows; one empty slice if there are no rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def teacher_chunk(teacher: LogitRows, part: slice) -> Tensor:
    """Some rows of a teacher's logits, in the teacher's dtype also under autocast."""
    if isinstance(teacher, FactoredLogits):
        with torch.no_grad(), torch.autocast(teacher.hidden_ND.device.type, enabled=False):
            return teacher._replace(hidden_ND=teacher.hidden_ND[part]).logits()
    return teacher[part]


def full_logits(teacher: LogitRows) -> Tensor:
    """All rows of a teacher's logits, (N, V), in float32 or float64."""
    return _at_least_float32(teacher_chunk(teacher, slice(None)))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _ChunkedSum(torch.autograd.Function):
    """The forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        arguments: _Arguments,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[1:]
        tensors = (hidden_ND, weight_VD, bias_V)
        gradients = [
            _zeros_like(tensor) if tensor is not None and need else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        student = _cast(FactoredLogits(*tensors))
        total: Any = 0
        for part in chunk_slices(len(hidden_ND), arguments.rows):
            logits_nV = student._replace(hidden_ND=student.hidden_ND[part]).logits()
            total = total + _replace_by_gradient(arguments, logits_nV, part, any(needed))
            _accumulate(gradients, logits_nV, student, part)
        ctx.gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors, strict=True)
        ]
        loss, others = total[0], total[1:]
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        # The gradients are as large as the head: they are scaled in place and not kept.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients)
        return None, *scaled


def _cast(factors: FactoredLogits) -> FactoredLogits:
    """The factors in the dtype in which autocast multiplies, converted once for all chunks."""
    hidden_ND, weight_VD, bias_V = factors
    dtype = _matmul_dtype(factors)
    return FactoredLogits(
        hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    )


def _matmul_dtype(factors: FactoredLogits) -> torch.dtype:
    """The dtype in which the factors are multiplied."""
    device, dtype = factors.hidden_ND.device.type, factors.weight_VD.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _replace_by_gradient(
    arguments: _Arguments, logits_nV: Tensor, chunk: slice, needs_gradient: bool
) -> Tensor:
    """The sums of a chunk, (K,); overwrites the student's logits with the gradient if needed."""
    sums, teacher, columns, _ = arguments
    teacher_nV = None if teacher is None else teacher_chunk(teacher, chunk)
    columns = tuple(column[chunk] for column in columns)
    total: Any = 0
    # On a GPU, one large kernel is faster.
    size = CACHE_BYTES if logits_nV.device.type == "cpu" else CHUNK_BYTES
    for part in chunk_slices(len(logits_nV), rows_within(logits_nV.shape[1], size)):
        teacher_rows = None if teacher_nV is None else _at_least_float32(teacher_nV[part])
        with torch.set_grad_enabled(needs_gradient):
            student_rows = logits_nV[part].detach().requires_grad_(needs_gradient)
            values_K = sums(student_rows, teacher_rows, *(column[part] for column in columns))
            if needs_gradient:
                logits_nV[part] = torch.autograd.grad(values_K[0], student_rows)[0]
        total = total + values_K.detach()
    return total


def _accumulate(
    gradients: list[Tensor | None], gradient_nV: Tensor, student: FactoredLogits, part: slice
) -> None:
    """Add a chunk's contribution to the gradients of hidden states, weight and bias."""
    hidden_ND, weight_VD, bias_V = gradients
    if hidden_ND is not None:
        hidden_ND[part] = gradient_nV @ student.weight_VD
    if weight_VD is not None and gradient_nV.dtype == weight_VD.dtype:
        weight_VD.addmm_(gradient_nV.T, student.hidden_ND[part])
    elif weight_VD is not None:
        for block in chunk_slices(len(weight_VD), BLOCK):
            weight_VD[block] += gradient_nV[:, block].T @ student.hidden_ND[part]
    if bias_V is not None:
        bias_V += gradient_nV.sum(0, dtype=bias_V.dtype)
