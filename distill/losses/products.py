"""Matrix products of bfloat16 or float16 factors, with a float32 result.

    logits = hidden @ weight^T + bias, in float32, from factors in the dtype of autocast

Logits of 8 bits hide the difference of two similar models: at a KL of 0.02 nats a token, they put
an error of 20 % into its gradient. A CUDA device accumulates such a product in float32 anyway, and
can return it. A CPU multiplies float32 copies of the factors, which is as exact, and uses its
instructions for bfloat16 where it has them.

N = rows, V = vocabulary, D = width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill import internals

log = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Gradients of a sum over rows are multiplied by this before they become float16, whose numbers end
# at 6e-8 and 65504.
FLOAT16_SCALE = 256.0


class Products(NamedTuple):
    """Products of factors that are rounded to one dtype; results are float32, or float64.

    Args:
        dtype: The dtype of the factors.
        native: Whether the device multiplies low precision into float32. Otherwise the rounded
            factors are stored in float32.
    """

    dtype: torch.dtype
    native: bool

    @property
    def rounds(self) -> bool:
        """Whether factors have low precision."""
        return self.dtype in LOW_PRECISION

    def factor(self, tensor: Tensor) -> Tensor:
        """A factor, rounded; kept for all products with it."""
        rounded = tensor.to(self.dtype)
        return rounded.float() if self.rounds and not self.native else rounded

    def factors(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The factors of logits."""
        bias_V = None if bias_V is None else self.factor(bias_V)
        return self.factor(hidden_ND), self.factor(weight_VD), bias_V

    def linear(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """hidden @ weight^T + bias, (N, V)."""
        if not self.native:
            with self._instructions(hidden_ND.device):
                return F.linear(hidden_ND, weight_VD, bias_V)
        logits_NV = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
        return logits_NV if bias_V is None else logits_NV.add_(bias_V)

    def logits(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """:meth:`linear` of tensors that are not rounded yet, also under autocast."""
        with torch.autocast(weight_VD.device.type, enabled=False):
            return self.linear(*self.factors(hidden_ND, weight_VD, bias_V))

    def gradient_factor(self, gradient_NV: Tensor) -> Tensor:
        """The gradient of the logits as a factor, multiplied by `scale`."""
        if self.scale != 1:
            gradient_NV = (gradient_NV * self.scale).clamp(-self.limit, self.limit)
        return gradient_NV.to(self.gradient_dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of :meth:`gradient_factor`: float32 if the other factors are stored in it."""
        return self.dtype if self.native or not self.rounds else torch.float32

    @property
    def scale(self) -> float:
        """Factor of the gradient of a sum over rows, before it is rounded."""
        return FLOAT16_SCALE if self.native and self.dtype == torch.float16 else 1.0

    @property
    def limit(self) -> float:
        """Largest absolute value of a scaled gradient."""
        return torch.finfo(self.gradient_dtype).max

    def hidden_gradient(self, gradient_NV: Tensor, weight_VD: Tensor) -> Tensor:
        """The gradient of the hidden states, from :meth:`gradient_factor`."""
        if self.native:
            product_ND = torch.mm(gradient_NV, weight_VD, out_dtype=torch.float32)
            return product_ND if self.scale == 1 else product_ND.div_(self.scale)
        with self._instructions(gradient_NV.device):
            return gradient_NV @ weight_VD

    def add_weight_gradient(self, total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
        """Add the gradient of the weight, from :meth:`gradient_factor`, to a sum in float32."""
        if self.native:
            add_product(total_VD, gradient_NV.T, hidden_ND, 1 / self.scale)
            return
        with self._instructions(gradient_NV.device):
            total_VD.addmm_(gradient_NV.T, hidden_ND)

    @contextmanager
    def _instructions(self, device: torch.device) -> Iterator[None]:
        """Use a CPU's instructions for bfloat16; exact, because the factors are rounded already."""
        if (
            self.dtype != torch.bfloat16
            or device.type != "cpu"
            or not internals.cpu_supports_bf16()
        ):
            yield
            return
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight multiplies."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def products_of(dtype: torch.dtype, device: torch.device) -> Products:
    """The products of factors of a dtype on a device."""
    native = device.type == "cuda" and dtype in LOW_PRECISION and _returns_float32(dtype, device)
    return Products(dtype, native)


@lru_cache
def _returns_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device offers `torch.mm(..., out_dtype=torch.float32)`."""
    factor = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        total = torch.mm(factor, factor, out_dtype=torch.float32)
        add_product(total, factor, factor, 1.0)
    except (RuntimeError, NotImplementedError) as error:
        log.warning(
            "%s has no product of %s with a float32 result (%s): logits are multiplied in float32",
            device, dtype, str(error).splitlines()[0],
        )  # fmt: skip
        return False
    return True


@torch.library.custom_op("distill::add_product", mutates_args={"total"})
def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total += factor * left @ right, in the float32 of the total, without a copy of it."""
    torch.addmm(total, left, right, alpha=factor, out_dtype=torch.float32, out=total)


@add_product.register_fake
def _(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    assert total.shape == (left.shape[0], right.shape[1])


def linear_float32(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """A linear layer whose factors have the dtype of autocast, and whose result has not.

    Args:
        hidden: (..., D).
        weight_VD: The weight.
        bias_V: The bias, if any.

    Returns:
        (..., V), float32; in float32 and float64 the same as `F.linear`.
    """
    dtype = autocast_dtype(weight_VD)
    if dtype not in LOW_PRECISION:
        return F.linear(hidden, weight_VD, bias_V)
    rows_NV = _Linear.apply(hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, dtype)
    return rows_NV.view(*hidden.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.products = products_of(dtype, weight_VD.device)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(hidden_ND, weight_VD)
        return ctx.products.logits(hidden_ND, weight_VD, bias_V)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient_NV,), products = outer, ctx.products
        hidden_ND, weight_VD = ctx.saved_tensors
        # Not scaled: it may hold the factor of a gradient scaler already.
        rounded_NV = gradient_NV.to(products.gradient_dtype)
        hidden = weight = bias = None
        with torch.autocast(weight_VD.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                columns_DV = products.factor(weight_VD).T
                hidden = products.linear(rounded_NV, columns_DV, None).to(hidden_ND.dtype)
            if ctx.needs_input_grad[1]:
                columns_DN = products.factor(hidden_ND).T
                weight = products.linear(rounded_NV.T, columns_DN, None).to(weight_VD.dtype)
        if ctx.needs_input_grad[2]:
            bias = gradient_NV.sum(0).to(ctx.bias_dtype)
        return hidden, weight, bias, None
