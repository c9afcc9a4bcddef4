"""Importance of neurons, attention heads and blocks, and the masks of those to keep.

Shapes: N = tokens, D = features, G = groups of a block (its neurons, or its heads), B = examples,
L = length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from distill.compress.observe import Observer
from distill.compress.structure import Groups
from distill.models.block_probe import block_input
from distill.models.families import blocks

__all__ = [
    "BlockInfluence",
    "activation_sum",
    "explain_excess",
    "first_order",
    "keep_globally",
    "keep_highest",
    "keep_per_block",
    "magnitude",
]


def activation_sum(input_ND: Tensor) -> Tensor:
    """Sum of |a| over tokens, (D,), of the neurons' outputs; for :class:`Observer`."""
    return input_ND.abs().sum(0)


def magnitude(groups: Groups) -> Tensor:
    """Euclidean norm of the weights of each group, without biases, (G,)."""
    weights = (part for part in groups.slices if part.parameter.ndim > 1)
    squares = [part.by_group(part.parameter.detach().float()).square().sum(1) for part in weights]
    return torch.stack(squares).sum(0).sqrt()


def first_order(groups: Groups) -> Tensor:
    """First-order estimate of how much the loss changes without each group, (G,).

    |sum of w * dL/dw| over its columns of the output projection (Molchanov et al. 2019, eq. 8).
    For heads this is |gate * dL/dgate| of a batch (Michel et al. 2019, section 4.1).
    """
    weight = groups.output.parameter
    assert weight.grad is not None
    return groups.output.by_group((weight.detach() * weight.grad).float()).sum(1).abs()


class BlockInfluence(Observer):
    """Sum of 1 - cosine(input, output) over tokens for each block (Men et al. 2024, section 2.2).

    Args:
        student: the model to observe. The keys of `values` are positions of blocks: "0", "1".
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__(student, {}, activation_sum)
        for position, block in enumerate(blocks(student)):
            hook = self._compare(str(position))
            self._hooks.append(block.register_forward_hook(hook, with_kwargs=True))

    def _compare(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(block: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if block.training:
                output_BLD = output[0] if isinstance(output, tuple) else output
                before_ND = self._tokens(block_input(inputs, named))
                after_ND = self._tokens(output_BLD)
                change = (1 - cosine_similarity(before_ND, after_ND, dim=-1)).sum()
                self.values[name] = self.values.get(name, 0) + change

        return hook


def keep_highest(scores_G: Tensor, kept_G: Tensor, removed: int) -> Tensor:
    """A mask of the groups to keep, (G,).

    Args:
        scores_G: importance of each group.
        kept_G: mask of the groups that have not been removed; removed ones stay removed.
        removed: total number of groups to remove. Of equal scores, the first ones are removed.
    """
    order = scores_G.masked_fill(~kept_G, -torch.inf).argsort(stable=True)
    return torch.ones_like(kept_G).index_fill_(0, order[:removed], False)


def keep_per_block(scores: list[Tensor], masks: list[Tensor], share: float) -> list[Tensor]:
    """Remove the same share of each block's groups.

    Args:
        scores: importance of the groups, one tensor (G,) per block.
        masks: mask of the groups that have not been removed, one tensor (G,) per block.
        share: total share of the groups to remove, rounded to an integer number of groups.
    """
    return [
        keep_highest(scores_G, kept_G, round(share * len(kept_G)))
        for scores_G, kept_G in zip(scores, masks, strict=True)
    ]


def keep_globally(scores: list[Tensor], masks: list[Tensor], share: float) -> list[Tensor]:
    """Remove a share of the groups of all blocks together, by one ranking.

    Scores are divided by their norm in each block, so that they can be compared. The best group of
    each block always stays. The arguments are those of :func:`keep_per_block`.
    """
    normalized = [
        _normalize(scores_G, kept_G) for scores_G, kept_G in zip(scores, masks, strict=True)
    ]
    sizes = [len(kept_G) for kept_G in masks]
    removed = round(share * sum(sizes))
    return list(keep_highest(torch.cat(normalized), torch.cat(masks), removed).split(sizes))


def _normalize(scores_G: Tensor, kept_G: Tensor) -> Tensor:
    scores_G = scores_G.masked_fill(~kept_G, 0)
    best = scores_G.masked_fill(~kept_G, -torch.inf).argmax()
    norm = scores_G.norm().clamp_min(torch.finfo(scores_G.dtype).tiny)
    return (scores_G / norm).index_fill_(0, best, torch.inf)


def explain_excess(share: float, counts: list[int], equal: bool) -> str:
    """Explain why a share of the groups cannot be removed: each block must keep at least one.

    Args:
        share: share of the groups to remove.
        counts: number of groups of each block.
        equal: whether each block loses the same share.

    Returns:
        The end of a sentence; empty if the share can be removed.
    """
    if equal:
        return next(
            (f"all {count} of a block" for count in counts if round(share * count) >= count), ""
        )
    removed, total = round(share * sum(counts)), sum(counts)
    removable = total - len(counts)
    if removed <= removable:
        return ""
    return f"{removed} of {total}, and {removable} leave one to each block"
