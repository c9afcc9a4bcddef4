"""Which neurons, heads or blocks matter least, and so which of them go.

N = tokens, D = features, G = groups of a block (its neurons, or its heads).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from distill.compress.observe import Observer
from distill.compress.structure import Groups, Part
from distill.models.architectures import blocks


def activation(input_ND: Tensor) -> Tensor:
    """Sum over N tokens of |a|, (D,): what the neurons hand to the output projection (for :class:`Observer`)."""
    return input_ND.abs().sum(0)


def magnitude(groups: Groups) -> Tensor:
    """Euclidean norm of each group's weights, (G,); biases do not count."""
    weights = (part for part in groups.parts if part.parameter.ndim > 1)
    return (
        torch.stack([_by_group(part, part.parameter.detach()).square().sum(1) for part in weights])
        .sum(0)
        .sqrt()
    )


def first_order(groups: Groups) -> Tensor:
    """|sum of w * dL/dw| over each group's columns of the output projection, (G,): the change of the loss without the group.

    To first order: Molchanov et al. 2019, equation 8; for heads it is |gate * dL/dgate| of Michel et al. 2019, section 4.1, of a batch.
    """
    weight = groups.output.parameter
    assert weight.grad is not None
    return _by_group(groups.output, weight.detach() * weight.grad).sum(1).abs()


def _by_group(part: Part, tensor: Tensor) -> Tensor:
    return tensor.float().movedim(part.dim, 0).reshape(tensor.shape[part.dim] // part.size, -1)


class BlockInfluence(Observer):
    """Sum over tokens of 1 - cosine(x_in, x_out) of each block: how much it turns what passes through (Men et al. 2024, section 2.2)."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__(student, {}, activation)
        for place, block in enumerate(blocks(student)):
            self._handles.append(block.register_forward_hook(self._compare(str(place))))

    def _compare(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        @torch.no_grad()
        def hook(block: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if block.training:
                after_BLD = output[0] if isinstance(output, tuple) else output
                turned = (
                    1 - cosine_similarity(self._tokens(inputs[0]), self._tokens(after_BLD), dim=-1)
                ).sum()
                self.values[name] = self.values.get(name, 0) + turned

        return hook


def lowest(scores_G: Tensor, kept_G: Tensor, count: int) -> Tensor:
    """Which groups stay, (G,), when `count` in all have gone: those already gone, then the lowest scores, then the first."""
    order = scores_G.masked_fill(~kept_G, -torch.inf).argsort(stable=True)
    return torch.ones_like(kept_G).index_fill_(0, order[:count], False)


def keep_per_block(scores: list[Tensor], kept: list[Tensor], share: float) -> list[Tensor]:
    """Which groups stay when each block has lost this share of its own, to the group (rounded)."""
    return [
        lowest(scores_G, kept_G, round(share * len(kept_G)))
        for scores_G, kept_G in zip(scores, kept, strict=True)
    ]


def keep_globally(scores: list[Tensor], kept: list[Tensor], share: float) -> list[Tensor]:
    """Which groups stay when all blocks together have lost this share: one ranking, by scores divided by their block's norm.

    The best group of each block stays whatever the others' scores are.
    """
    ranked = [_normalised(scores_G, kept_G) for scores_G, kept_G in zip(scores, kept, strict=True)]
    sizes = [len(kept_G) for kept_G in kept]
    return list(lowest(torch.cat(ranked), torch.cat(kept), round(share * sum(sizes))).split(sizes))


def _normalised(scores_G: Tensor, kept_G: Tensor) -> Tensor:
    scores_G = scores_G.masked_fill(~kept_G, 0)
    best = scores_G.masked_fill(~kept_G, -torch.inf).argmax()
    return (scores_G / scores_G.norm().clamp_min(torch.finfo(scores_G.dtype).tiny)).index_fill_(
        0, best, torch.inf
    )


def explain_excess(share: float, counts: list[int], equal: bool) -> str:
    """Why blocks with so many groups cannot lose this share, since one must stay in each; empty where they can."""
    if equal:
        return next(
            (f"all {count} of a block" for count in counts if round(share * count) >= count), ""
        )
    total, most = sum(counts), sum(counts) - len(counts)
    return (
        f"{round(share * total)} of {total}, and {most} leave one to each block"
        if round(share * total) > most
        else ""
    )
