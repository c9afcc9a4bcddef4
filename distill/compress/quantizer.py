"""weight -> codes on a grid, and the values that they stand for: linear grids of 2 to 8 bits, NF4, codebooks.

O = output features, or rows of an embedding; I = input features; G = groups of neighbours that share a grid, S = their size; K = 2^bits.
Every quantizer here is idempotent bit for bit: its own values come back with the same codes. So a quantized weight needs nothing beside it:
:func:`codes` finds the same grid again.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.compress import codebook
from distill.errors import UserError
from distill.remote_code.modeling import NF4, fake_quantize, look_up

__all__ = [
    "QuantSpec",
    "fake_quantize",
    "fake_quantize_weight",
    "quantize_weight",
    "scale_and_zero_point",
]

METHODS = ("linear", "codebook", "nf4")
GROUP_SIZE = 64  # inputs that share a grid of few bits
MIN_EMBEDDING_ROWS = 16  # rows of the smallest embedding that is worth quantizing
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantized; as a dictionary (`asdict`) it travels in `config.compression["weights"]`."""

    method: str = "linear"
    bits: int = 8
    symmetric: bool = True  # linear: the grid is centred on 0
    group: int = 0  # inputs that share a grid: -1 the whole tensor, 0 each output row, above that so many neighbours of a row

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"method is {self.method}, but it must be one of {', '.join(METHODS)}: choose one of them"
            )
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise UserError(
                f"bits is {self.bits!r}, but a code has 2 to 8 bits: 8 keeps the most, 4 is half as big"
            )
        if not (isinstance(self.group, int) and self.group >= -1):
            raise UserError(
                f"group is {self.group}, but it must be -1 (one grid for a tensor), 0 (for each row) or a number of inputs: take 64"
            )
        if self.method == "nf4" and self.bits != 4:
            raise UserError(
                f"bits is {self.bits}, but nf4 has 4: set bits to 4, or method to linear or codebook"
            )
        if self.method == "nf4" and self.group < 1:
            raise UserError(
                f"group is {self.group}, but nf4 needs a number of inputs that share a scale: take 64"
            )

    @property
    def levels(self) -> int:
        """The largest code of a linear grid: one less for a symmetric one, which has as many levels on both sides of 0."""
        return 2**self.bits - (2 if self.symmetric else 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, name: str, width: int) -> None:
        """UserError where the group does not divide this tensor's number of inputs."""
        if self.group > 0 and width % self.group:
            raise UserError(
                f"group is {self.group}, but it must divide the {width} inputs of {name}: {largest_divisor(width, self.group)} does"
            )

    def grouped(self, weight_OI: Tensor) -> Tensor:
        """The same entries as (G, S)."""
        return weight_OI.contiguous().view(
            *((1, -1) if self.group == -1 else (-1, self.group or weight_OI.shape[-1]))
        )


def largest_divisor(width: int, most: int) -> int:
    """The largest divisor of `width` that is at most `most`."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)


def default_group_size(bits: int, width: int) -> int:
    """The group of a linear grid: with 8 bits the row; with fewer NEIGHBOURS inputs, or as many as divide it, if that is not a handful."""
    group = largest_divisor(width, GROUP_SIZE)
    return group if bits < 8 and 4 * group >= min(width, GROUP_SIZE) else 0


def quantize_weight(
    weight_OI: Tensor, spec: QuantSpec, sparse: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """(codes_OI in uint8, all below 2^bits; what else :func:`values` needs to turn them into weights, in the dtypes to store).

    linear {scale: (G,) float16, zero: (G,) uint8 if not symmetric}, nf4 {scale}, codebook {centroids: (G, K) float16}.
    `sparse`: the zeros of a codebook's tensor are stored elsewhere; their codes say nothing.
    """
    weight_GS = spec.grouped(weight_OI.detach().float())
    if spec.method == "codebook":
        centroids_GK = codebook.fit_centroids(weight_GS, spec.bits, sparse)
        return codebook.assign(weight_GS, centroids_GK).to(torch.uint8).view(weight_OI.shape), {
            "centroids": centroids_GK.half()
        }
    scale_G1, zero_G1 = scale_and_zero_point(weight_GS, spec)
    parameters = {"scale": scale_G1.flatten().half()}
    if spec.method == "nf4":
        return nearest_level(weight_GS, scale_G1).to(torch.uint8).view(weight_OI.shape), parameters
    if not spec.symmetric:
        parameters["zero"] = zero_G1.flatten().to(torch.uint8)
    return on_grid(weight_GS, scale_G1, zero_G1, spec.levels).to(torch.uint8).view(
        weight_OI.shape
    ), parameters


def fake_quantize_weight(
    weight_OI: Tensor,
    spec: QuantSpec,
    sparse: bool = False,
    centroids_GK: Tensor | None = None,
    whole_OI: Tensor | None = None,
) -> Tensor:
    """The values of :func:`codes`, without the way through codes: in float32, of the same shape, -0 as 0.

    A codebook is that of the weight itself unless `centroids_GK` gives another. Where the weight is some rows of a table (`whole_OI`),
    these come out as in the whole one.
    """
    weight_GS = spec.grouped(weight_OI.detach().float())
    if spec.method == "codebook":
        centroids_GK = (
            codebook.fit_centroids(weight_GS, spec.bits, sparse)
            if centroids_GK is None
            else centroids_GK
        )
        return codebook.nearest_centroid(weight_GS, centroids_GK, sparse).view(weight_OI.shape)
    whole_GS = (
        weight_GS
        if whole_OI is None or spec.group != -1
        else spec.grouped(whole_OI.detach().float())
    )
    scale_G1, zero_G1 = scale_and_zero_point(whole_GS, spec)
    if spec.method == "nf4":
        levels_1K = torch.tensor([NF4], device=weight_OI.device)
        return (
            look_up(nearest_level(weight_GS, scale_G1), levels_1K)
            .mul_(scale_G1)
            .view(weight_OI.shape)
        )
    return (
        on_grid(weight_GS, scale_G1, zero_G1, spec.levels)
        .sub_(zero_G1)
        .mul_(scale_G1)
        .view(weight_OI.shape)
    )


def on_grid(weight_GS: Tensor, scale_G1: Tensor, zero_G1: Tensor, levels: int) -> Tensor:
    """The linear codes, as floats: clamp(round(w / scale) + zero, 0, levels). In place where it can: memory is what costs."""
    return (weight_GS / scale_G1).round_().add_(zero_G1).clamp_(0, levels)


def nearest_level(weight_GS: Tensor, scale_G1: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=weight_GS.device)
    return torch.bucketize(weight_GS / scale_G1, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def scale_and_zero_point(weight_GS: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(scale_G1, zero_G1) in float32: the finest grid of float16 scale that spans each group, 0 on it."""
    low_G1, high_G1 = (
        weight_GS.amin(1, keepdim=True).clamp(max=0),
        weight_GS.amax(1, keepdim=True).clamp(min=0),
    )
    if spec.method == "nf4":
        return rounded_up(torch.maximum(-low_G1, high_G1), spec.bits), torch.zeros_like(low_G1)
    if spec.symmetric:
        middle = spec.levels // 2
        return rounded_up(torch.maximum(-low_G1, high_G1) / middle, spec.bits), torch.full_like(
            low_G1, middle
        )
    scale_G1 = affine_scale(weight_GS, low_G1, high_G1, spec.bits)
    return scale_G1, torch.round(-low_G1 / scale_G1).clamp(0, spec.levels)


def affine_scale(weight_GS: Tensor, low_G1: Tensor, high_G1: Tensor, bits: int) -> Tensor:
    """(high - low) / (2^bits - 1), rounded up; or by one step less where only that grid has the group's ends on it.

    For a group that spans 254.9 steps, 100.4 of them below 0, comes back with its ends at -100 and 154: 254 steps. That this grid is
    then found again, and not a finer one, is what makes the quantizer idempotent.
    """
    levels = 2**bits - 1
    first_G1, second_G1 = (
        rounded_up((high_G1 - low_G1) / steps, bits) for steps in (levels, levels - 1)
    )
    ends_G2 = torch.cat([low_G1, high_G1], 1)
    fits_second = (
        (_fits(ends_G2, second_G1) & (second_G1 != first_G1).squeeze(1)).nonzero().squeeze(1)
    )
    if len(fits_second):  # seldom: unless the weights are a quantizer's, only by chance
        coarser = fits_second[~_fits(weight_GS[fits_second], first_G1[fits_second])]
        first_G1[coarser] = second_G1[coarser]
    return first_G1


def _fits(weight_GS: Tensor, scale_G1: Tensor) -> Tensor:
    """(G,): is all of the group on the grid?"""
    return ((weight_GS / scale_G1).round() * scale_G1 == weight_GS).all(1)


def rounded_up(scale: Tensor, bits: int) -> Tensor:
    """The next float16, as float32: so that code * scale is exact, and no weight is beyond the last code.

    At least 2^(bits - 23), where rounding up costs less than half a step over all 2^bits codes; a finer grid would not be idempotent.
    """
    half = scale.half()
    bumped = torch.where(
        half.float() < scale, (half.view(torch.int16) + 1).view(torch.float16), half
    )
    return bumped.float().clamp(2.0 ** (bits - 23), LARGEST)
