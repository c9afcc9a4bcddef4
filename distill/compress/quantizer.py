"""Quantization of weights: linear with 2 to 8 bits, NF4, codebooks.

Shapes: O = output features, or rows of an embedding; I = input features; G = groups of weights that
share a scale or a codebook; S = weights in a group; K = 2^bits.

All quantizers are idempotent bit for bit: quantized values are quantized to themselves. A quantized
weight is therefore stored as floating-point values, and :func:`quantize_weight` computes the
integers and the scale again.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.compress import codebook
from distill.errors import UserError
from distill.remote_code.modeling import NF4, look_up

__all__ = [
    "METHODS",
    "QuantSpec",
    "default_group_size",
    "fake_quantize_weight",
    "largest_divisor",
    "quantize_weight",
    "scale_and_zero_point",
]

METHODS = ("linear", "codebook", "nf4")
GROUP_SIZE = 64  # default number of inputs that share a scale, below 8 bits
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantized.

    It is stored as a dictionary in `config.compression["weights"]`.

    Args:
        method: ``linear`` (equally spaced values), ``codebook`` (k-means) or ``nf4`` (quantiles of
            a normal distribution).
        bits: bits per quantized weight, 2 to 8; 4 for nf4.
        symmetric: whether linear quantization is symmetric around 0.
        group: neighboring inputs that share a scale or codebook: 0 for a row, -1 for the tensor.
    """

    method: str = "linear"
    bits: int = 8
    symmetric: bool = True
    group: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            choices = ", ".join(METHODS)
            raise UserError(
                f"method is {self.method}, but it must be one of {choices}: choose one of them"
            )
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise UserError(
                f"bits is {self.bits!r}, but it must be a whole number from 2 to 8: "
                "8 loses the least, 4 is half as large"
            )
        if not (isinstance(self.group, int) and self.group >= -1):
            raise UserError(
                f"group is {self.group}, but it must be row, tensor or a number of inputs: take 64"
            )
        if self.method == "nf4" and self.bits != 4:
            raise UserError(
                f"bits is {self.bits}, but nf4 has 4: set bits to 4, or method to linear"
            )
        if self.method == "nf4" and self.group < 1:
            raise UserError(
                f"group is {_GROUP_WORDS[self.group]}, but nf4 needs a number of inputs that share "
                "a scale: take 64"
            )

    @property
    def quant_max(self) -> int:
        """The largest quantized value of linear quantization.

        A symmetric range omits one value, so that equally many lie below and above its middle.
        """
        return 2**self.bits - (2 if self.symmetric else 1)

    def as_dict(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return asdict(self)

    def check(self, name: str, width: int) -> None:
        """Check that groups divide a weight.

        Args:
            name: name of the tensor, for the message.
            width: its input features.

        Raises:
            UserError: if `group` does not divide `width`.
        """
        if self.group > 0 and width % self.group:
            raise UserError(
                f"group is {self.group}, but it must divide the {width} inputs of {name}: "
                f"{largest_divisor(width, self.group)} does"
            )

    def grouped(self, weight_OI: Tensor) -> Tensor:
        """The weight reshaped to (G, S)."""
        if self.group == -1:
            return weight_OI.contiguous().view(1, -1)
        return weight_OI.contiguous().view(-1, self.group or weight_OI.shape[-1])


_GROUP_WORDS = {0: "row", -1: "tensor"}


def largest_divisor(width: int, limit: int) -> int:
    """The largest divisor of `width` that is at most `limit`."""
    return next(size for size in range(min(width, limit), 0, -1) if width % size == 0)


def default_group_size(bits: int, width: int) -> int:
    """The default group of linear quantization, as in :class:`QuantSpec`.

    With 8 bits this is the row. With fewer bits it is 64 inputs, or the largest divisor of the
    width below 64; if that divisor is less than a quarter of min(width, 64), it is the row.
    """
    group = largest_divisor(width, GROUP_SIZE)
    return group if bits < 8 and 4 * group >= min(width, GROUP_SIZE) else 0


def quantize_weight(
    weight_OI: Tensor, spec: QuantSpec, sparse: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize a weight to integers.

    Args:
        weight_OI: the weight.
        spec: how to quantize it.
        sparse: whether zeros are stored as a mask, so that a codebook excludes them.

    Returns:
        - qweight_OI, uint8, below 2^bits;
        - the other tensors that :func:`distill.remote_code.modeling.dequantize` needs: scale (G,)
          in float16 and, if affine, zero (G,) in uint8; or centroids (G, K) in float16.
    """
    weight_GS = spec.grouped(weight_OI.detach().float())
    if spec.method == "codebook":
        centroids_GK = codebook.fit_centroids(weight_GS, spec.bits, sparse)
        qweight_GS = codebook.assign(weight_GS, centroids_GK)
        parameters = {"centroids": centroids_GK.half()}
    else:
        scale_G1, zero_G1 = scale_and_zero_point(weight_GS, spec)
        parameters = {"scale": scale_G1.flatten().half()}
        if spec.method == "nf4":
            qweight_GS = _nearest_nf4(weight_GS, scale_G1)
        else:
            qweight_GS = _quantize_linear(weight_GS, scale_G1, zero_G1, spec.quant_max)
            if not spec.symmetric:
                parameters["zero"] = zero_G1.flatten().to(torch.uint8)
    return qweight_GS.to(torch.uint8).view(weight_OI.shape), parameters


def fake_quantize_weight(
    weight_OI: Tensor,
    spec: QuantSpec,
    sparse: bool = False,
    centroids_GK: Tensor | None = None,
    table_OI: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize a weight.

    Args:
        weight_OI: the weight.
        spec: how to quantize it.
        sparse: whether a codebook excludes zeros, which stay 0.
        centroids_GK: the codebooks; fitted to the weight by default.
        table_OI: the embedding from which the rows `weight_OI` were looked up: with one scale for
            the tensor, the scale is that of the embedding.

    Returns:
        The values in float32, of the same shape, with 0 for -0.
    """
    weight_GS = spec.grouped(weight_OI.detach().float())
    if spec.method == "codebook":
        if centroids_GK is None:
            centroids_GK = codebook.fit_centroids(weight_GS, spec.bits, sparse)
        return codebook.nearest_centroid(weight_GS, centroids_GK, sparse).view(weight_OI.shape)
    range_GS = weight_GS
    if table_OI is not None and spec.group == -1:
        range_GS = spec.grouped(table_OI.detach().float())
    scale_G1, zero_G1 = scale_and_zero_point(range_GS, spec)
    if spec.method == "nf4":
        levels_1K = torch.tensor([NF4], device=weight_OI.device)
        value_GS = look_up(_nearest_nf4(weight_GS, scale_G1), levels_1K)
    else:
        value_GS = _quantize_linear(weight_GS, scale_G1, zero_G1, spec.quant_max).sub_(zero_G1)
    return value_GS.mul_(scale_G1).view(weight_OI.shape)


def _quantize_linear(
    weight_GS: Tensor, scale_G1: Tensor, zero_G1: Tensor, quant_max: int
) -> Tensor:
    """clamp(round(w / scale) + zero, 0, quant_max), in float32. In place, to save memory."""
    return (weight_GS / scale_G1).round_().add_(zero_G1).clamp_(0, quant_max)


def _nearest_nf4(weight_GS: Tensor, scale_G1: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=weight_GS.device)
    return torch.bucketize(weight_GS / scale_G1, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def scale_and_zero_point(weight_GS: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of linear and nf4 quantization.

    Args:
        weight_GS: the weights, by group.
        spec: how they are quantized.

    Returns:
        scale_G1 and zero_G1 in float32. The scale is the smallest float16 number with which the
        range of each group, extended to 0, is representable.
    """
    low_G1 = weight_GS.amin(1, keepdim=True).clamp(max=0)
    high_G1 = weight_GS.amax(1, keepdim=True).clamp(min=0)
    largest_G1 = torch.maximum(-low_G1, high_G1)
    if spec.method == "nf4":
        return _round_up_to_half(largest_G1, spec.bits), torch.zeros_like(low_G1)
    if spec.symmetric:
        middle = spec.quant_max // 2
        scale_G1 = _round_up_to_half(largest_G1 / middle, spec.bits)
        return scale_G1, torch.full_like(low_G1, middle)
    scale_G1 = _affine_scale(weight_GS, low_G1, high_G1, spec.bits)
    return scale_G1, torch.round(-low_G1 / scale_G1).clamp(0, spec.quant_max)


def _affine_scale(weight_GS: Tensor, low_G1: Tensor, high_G1: Tensor, bits: int) -> Tensor:
    """(high - low) / (2^bits - 1), rounded up to float16; or (high - low) / (2^bits - 2).

    The second is needed for idempotence. Rounding can shorten the range of a group by one step: the
    ends of a range from -100.4 to 154.5 steps become -100 and 154. If the ends are multiples of
    `(high - low) / (2^bits - 2)` and not all weights are multiples of the first scale, the weights
    were quantized with the second one.
    """
    steps = 2**bits - 1
    first_G1, second_G1 = (
        _round_up_to_half((high_G1 - low_G1) / count, bits) for count in (steps, steps - 1)
    )
    ends_G2 = torch.cat([low_G1, high_G1], 1)
    candidate_G = _are_multiples(ends_G2, second_G1) & (second_G1 != first_G1).squeeze(1)
    candidates = candidate_G.nonzero().squeeze(1)
    if len(candidates):  # rare, unless the weights were quantized before
        multiples = _are_multiples(weight_GS[candidates], first_G1[candidates])
        first_G1[candidates[~multiples]] = second_G1[candidates[~multiples]]
    return first_G1


def _are_multiples(weight_GS: Tensor, scale_G1: Tensor) -> Tensor:
    """(G,): whether all weights of a group are multiples of its scale."""
    return ((weight_GS / scale_G1).round() * scale_G1 == weight_GS).all(1)


def _round_up_to_half(scale: Tensor, bits: int) -> Tensor:
    """The next float16 number, in float32: integer * scale is exact, and no weight is clamped.

    It is at least 2^(bits - 23): below that, rounding up would cost more than half a step over all
    2^bits values, and quantization would not be idempotent.
    """
    half = scale.half()
    next_half = (half.view(torch.int16) + 1).view(torch.float16)
    rounded = torch.where(half.float() < scale, next_half, half)
    return rounded.float().clamp(2.0 ** (bits - 23), _FLOAT16_MAX)
