"""Scores and a sparsity -> boolean masks: True is kept, False removed, exact to the parameter.

O = output features, I = input features. Of n weights, `round(sparsity * n)` are removed: those of the lowest score, and of
equal scores those that come first. So a mask is a function of its scores alone, the same on every rank, and with the same scores
a larger sparsity removes all that a smaller one does.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distill.errors import UserError


def per_layer(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The same share of each layer is removed."""
    return {
        name: _without_lowest(score.reshape(1, -1), sparsity).view(score.shape)
        for name, score in scores_OI.items()
    }


def per_row(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The same share of each output row is removed, which is the group that Wanda compares within."""
    return {name: _without_lowest(score, sparsity) for name, score in scores_OI.items()}


def across_layers(scores_OI: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One threshold for all layers, so that some lose more than others."""
    together = torch.cat([score.reshape(-1) for score in scores_OI.values()])
    kept = _without_lowest(together[None], sparsity)[0].split(
        [score.numel() for score in scores_OI.values()]
    )
    return {
        name: part.view(score.shape)
        for part, (name, score) in zip(kept, scores_OI.items(), strict=True)
    }


SCOPES: Mapping[str, Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]] = {
    "layer": per_layer,
    "row": per_row,
    "global": across_layers,
}


def n_of_m(scores_OI: Mapping[str, Tensor], kept: int, group: int) -> dict[str, Tensor]:
    """The highest `kept` of every `group` neighbours along the input dimension stay; UserError where they do not fit."""
    for name, score in scores_OI.items():
        check_width(name, score.shape[1], kept, group)
    return {
        name: _without(score.reshape(-1, group), group - kept).view(score.shape)
        for name, score in scores_OI.items()
    }


def check_width(name: str, width: int, kept: int, group: int) -> None:
    """UserError where the groups of N:M do not fill a layer's inputs."""
    if width % group:
        raise UserError(
            f"pattern is {kept}:{group}, but {name} has {width} inputs, which {group} does not divide: "
            "choose a pattern that fits, or name only other layers in layers"
        )


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`2:4` -> (2, 4): how many are kept, of how many."""
    numbers = str(pattern).split(":")
    if (
        len(numbers) == 2
        and all(number.isdecimal() for number in numbers)
        and 0 < int(numbers[0]) < int(numbers[1])
    ):
        return int(numbers[0]), int(numbers[1])
    raise UserError(
        f"pattern is {pattern}, but it must be N:M with 0 < N < M, written as text: '2:4' keeps 2 of every 4 weights"
    )


def _without_lowest(score_RC: Tensor, sparsity: float) -> Tensor:
    return _without(score_RC, round(sparsity * score_RC.shape[1]))


def _without(score_RC: Tensor, count: int) -> Tensor:
    """False at exactly `count` entries of each row: all below the count-th lowest, then the first of those equal to it."""
    if count == 0:
        return torch.ones_like(score_RC, dtype=torch.bool)
    threshold_R1 = score_RC.kthvalue(count, dim=1, keepdim=True).values
    below, level = score_RC < threshold_R1, score_RC == threshold_R1
    missing_R1 = count - below.sum(1, keepdim=True)
    return ~(below | (level & (level.cumsum(1, dtype=torch.int32) <= missing_R1)))
