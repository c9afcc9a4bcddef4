"""The loss of a language model from its last hidden states, without storing all logits.

    logits = hidden @ weight^T + bias
    d loss / d hidden = G @ weight,  d loss / d weight = G^T @ hidden,  where G = d loss / d logits

The rows are processed in chunks. G of a chunk is added to the gradients before the next chunk is
processed. So the forward pass computes the gradients too, and memory does not grow with N * V.
Values and gradients equal those of the full logits, up to rounding. Logits and G are float32 also
where the factors are not; only for the products with G is it rounded (`products.py`).

N = rows, V = vocabulary, D = width, n = rows of a chunk, K = number of summed values.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses.chunk_loss import ChunkLoss, LossSums
from distill.losses.chunk_sizes import (
    chunk_bytes,
    chunk_rows,
    chunk_slices,
    device_memory,
    rows_within,
)
from distill.losses.fused import FusedLoss
from distill.losses.products import (
    Products,
    at_least_float32,
    autocast_dtype,
    linear_float32,
    products_of,
)


class FactoredLogits(NamedTuple):
    """Rows of logits in factored form: hidden states, and the head's weight and bias."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def logits(self) -> Tensor:
        """The product, (N, V), at least float32."""
        return linear_float32(*self)


LogitRows = FactoredLogits | Tensor


class _Arguments(NamedTuple):
    """The arguments of a chunked loss besides the student's factors."""

    sums: LossSums
    teacher: LogitRows | None
    columns: tuple[Tensor, ...]
    rows: int
    loss: FusedLoss | None


def sum_in_chunks(
    sums: LossSums,
    student: LogitRows,
    teacher: LogitRows | None = None,
    columns: tuple[Tensor, ...] = (),
    rows: int | None = None,
    loss: FusedLoss | None = None,
) -> Tensor:
    """Sum a loss over all rows.

    Args:
        sums: Computes K values of some rows, each a sum over the rows.
        student: Factors, which are processed in chunks, or logits, which are processed at once.
        teacher: Factors or logits; None if the loss needs no teacher.
        columns: Labels and other inputs per row, (N, ...).
        rows: Rows of a chunk; None chooses them by the device (`chunk_sizes.py`).
        loss: The same as `sums`, for a GPU's kernel; None if there is none. The only column is
            then the labels.

    Returns:
        (K,). From factors, only the first value has a gradient.
    """
    if isinstance(student, Tensor):
        return sums(student, None if teacher is None else full_logits(teacher), *columns)
    weight_VD = student.weight_VD
    rows = rows or chunk_rows(
        len(student.hidden_ND), len(weight_VD), device_memory(weight_VD.device)
    )
    factors = (
        student
        if torch.is_grad_enabled()
        else (None if tensor is None else tensor.detach() for tensor in student)
    )
    # A compiler calls it as it is; without one, importing the compiler would take seconds.
    apply = torch.compiler.disable(_apply) if torch.compiler.is_compiling() else _apply
    value, others = apply(_Arguments(sums, teacher, columns, rows, loss), *factors)
    return torch.cat([value[None], others])


def logit_chunks(teacher: LogitRows, dtype: torch.dtype | None = None) -> Callable[[slice], Tensor]:
    """A function that returns some rows of a teacher's logits.

    The factors are converted once, for all chunks; they are multiplied in `dtype`, by default the
    teacher's, also under autocast.
    """
    if isinstance(teacher, Tensor):
        return teacher.__getitem__
    products = products_of(dtype or teacher.weight_VD.dtype, teacher.weight_VD.device)
    with torch.no_grad():
        hidden_ND, weight_VD, bias_V = products.factors(*teacher)

    @torch.no_grad()
    def chunk(part: slice) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return products.linear(hidden_ND[part], weight_VD, bias_V)

    return chunk


def teacher_chunk(teacher: LogitRows, part: slice) -> Tensor:
    """Some rows of a teacher's logits; from factors, at least float32."""
    return logit_chunks(teacher)(part)


def rows_in_chunks(
    *models: LogitRows, rows: int | None = None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows at a time of the logits of several models, outside of training.

    Args:
        models: Rows of the same tokens; factors are multiplied as training multiplies them.
        rows: Rows of a chunk; None chooses them by the device (`chunk_sizes.py`).

    Yields:
        Which rows, and each model's logits for them, (n, V), in float32 or float64.
    """
    sizes = [_shape(model) for model in models]
    rows = rows or rows_within(max(width for _, width in sizes), chunk_bytes(_device(models[0])))
    chunks = [_autocast_chunks(model) for model in models]
    for part in chunk_slices(sizes[0][0], rows):
        yield part, [at_least_float32(chunk(part)) for chunk in chunks]


def _autocast_chunks(model: LogitRows) -> Callable[[slice], Tensor]:
    dtype = None if isinstance(model, Tensor) else autocast_dtype(model.weight_VD)
    return logit_chunks(model, dtype)


def _device(rows: LogitRows) -> torch.device:
    return rows.device if isinstance(rows, Tensor) else rows.hidden_ND.device


def _shape(rows: LogitRows) -> tuple[int, int]:
    """N and V."""
    if isinstance(rows, FactoredLogits):
        return len(rows.hidden_ND), len(rows.weight_VD)
    return rows.shape[0], rows.shape[1]


def full_logits(teacher: LogitRows) -> Tensor:
    """All rows of a teacher's logits, (N, V), in float32 or float64."""
    return at_least_float32(teacher_chunk(teacher, slice(None)))


def _apply(*arguments: Any) -> Any:
    return _ChunkedSum.apply(*arguments)


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
        products = products_of(autocast_dtype(weight_VD), weight_VD.device)
        student = FactoredLogits(*products.factors(hidden_ND, weight_VD, bias_V))
        loss = ChunkLoss(
            arguments.sums,
            arguments.loss,
            None if arguments.teacher is None else logit_chunks(arguments.teacher),
            arguments.columns,
            products,
            any(needed),
        )
        total: Any = 0
        for part in chunk_slices(len(hidden_ND), arguments.rows):
            with torch.autocast(weight_VD.device.type, enabled=False):
                logits_nV = products.linear(student.hidden_ND[part], *student[1:])
            values_K, gradient_nV = loss(logits_nV, part)
            del logits_nV  # deleted at once, so that no two chunks are in memory
            total = total + values_K
            with torch.autocast(weight_VD.device.type, enabled=False):
                _accumulate(gradients, gradient_nV, student, part, products)
            del gradient_nV
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        value, others = total[0], total[1:]
        ctx.mark_non_differentiable(others)
        return value, others

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        # The gradients are as large as the head: they are scaled in place and not kept. They are
        # rounded last, because a gradient scaler makes up for small numbers of float16.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(outer[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, *scaled


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _accumulate(
    gradients: list[Tensor | None],
    gradient_nV: Tensor,
    student: FactoredLogits,
    part: slice,
    products: Products,
) -> None:
    """Add a chunk's contribution to the gradients of hidden states, weight and bias."""
    hidden_ND, weight_VD, bias_V = gradients
    if hidden_ND is not None:
        hidden_ND[part] = products.hidden_gradient(gradient_nV, student.weight_VD)
    if weight_VD is not None:
        products.add_weight_gradient(weight_VD, gradient_nV, student.hidden_ND[part])
    if bias_V is not None:
        sum_V = gradient_nV.sum(0, dtype=bias_V.dtype)
        bias_V += sum_V if products.scale == 1 else sum_V / products.scale
