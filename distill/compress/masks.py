"""Scores and a sparsity -> boolean masks, True where a weight is kept.

Of n weights, exactly `round(sparsity * n)` are removed: those with the lowest scores and, of equal
scores, the first. A mask therefore depends on its scores only and is the same on all ranks, and a
larger sparsity removes every weight that a smaller one removes.

Shapes: O = output features, I = input features, R = rows, C = columns.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distill.errors import UserError

__all__ = [
    "SCOPES",
    "across_layers",
    "check_width",
    "n_of_m",
    "parse_pattern",
    "per_layer",
    "per_row",
]


def per_layer(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Remove the same share of each layer."""
    return {
        name: _keep_highest(score.reshape(1, -1), sparsity).view(score.shape)
        for name, score in scores_OI.items()
    }


def per_row(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Remove the same share of each output row, as Wanda does."""
    return {name: _keep_highest(score, sparsity) for name, score in scores_OI.items()}


def across_layers(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Remove a share of the weights of all layers together, with one threshold for all scores."""
    flat_N = torch.cat([score.reshape(-1) for score in scores_OI.values()])
    sizes = [score.numel() for score in scores_OI.values()]
    masks = _keep_highest(flat_N[None], sparsity)[0].split(sizes)
    return {
        name: mask.view(score.shape)
        for mask, (name, score) in zip(masks, scores_OI.items(), strict=True)
    }


SCOPES: Mapping[str, Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]] = {
    "layer": per_layer,
    "row": per_row,
    "global": across_layers,
}


def n_of_m(scores_OI: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """Keep the highest `n` of every `m` neighbors along the input dimension.

    Raises:
        UserError: if `m` does not divide the input features of a layer.
    """
    for name, score in scores_OI.items():
        check_width(name, score.shape[1], n, m)
    return {
        name: _remove_lowest(score.reshape(-1, m), m - n).view(score.shape)
        for name, score in scores_OI.items()
    }


def check_width(name: str, width: int, n: int, m: int) -> None:
    """Check that the pattern `n`:`m` fits a layer with `width` input features.

    Raises:
        UserError: if `m` does not divide `width`.
    """
    if width % m:
        raise UserError(
            f"pattern is {n}:{m}, but {name} has {width} inputs, which {m} does not divide: "
            "choose a pattern that fits, or name only other layers in layers"
        )


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Read a pattern N:M, which keeps N of every M weights.

    Raises:
        UserError: if it is not of this form.

    Example:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    numbers = str(pattern).split(":")
    decimal = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    if decimal and 0 < int(numbers[0]) < int(numbers[1]):
        return int(numbers[0]), int(numbers[1])
    raise UserError(
        f"pattern is {pattern}, but it must be N:M with 0 < N < M, written as text: "
        "'2:4' keeps 2 of every 4 weights"
    )


def _keep_highest(score_RC: Tensor, sparsity: float) -> Tensor:
    return _remove_lowest(score_RC, round(sparsity * score_RC.shape[1]))


def _remove_lowest(score_RC: Tensor, count: int) -> Tensor:
    """A mask that is False at `count` entries of each row; of equal scores, at the first."""
    if count == 0:
        return torch.ones_like(score_RC, dtype=torch.bool)
    threshold_R1 = score_RC.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score_RC < threshold_R1, score_RC == threshold_R1
    missing_R1 = count - below.sum(1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing_R1)))
