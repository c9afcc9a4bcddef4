"""Greedy replies of a language model to prompts, and how varied they are.

V = vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.models.sampling import Sampling, left_padded, write_completions

Tokens = list[int]

# Shares of the largest logit, and spacings of the dtype, by which padding may change logits.
TOLERANCE, SPACINGS = 1e-3, 8


@torch.no_grad()
def write_replies(
    model: Any, prompts: Sequence[Tokens], stop: Tokens, new_tokens: int, batch_size: int
) -> list[Tokens]:
    """The likeliest token at each place, as `generate` finds it, up to the first stop token.

    Args:
        model: In eval mode, on the device that computes.
        prompts: Token ids, at least one each.
        stop: Ids of the tokens that end a reply, which are a part of it.
        new_tokens: Tokens of a reply, at most.
        batch_size: Prompts that are continued at once, unless padding would change the replies.
    """
    size = batch_size if allows_left_padding(model, prompts) else 1
    sampling = Sampling(new_tokens, tuple(stop), temperature=0, batch_size=size, cache=None)
    return write_completions(model, prompts, sampling, [[0]] * len(prompts))


def allows_left_padding(model: Any, prompts: Sequence[Tokens]) -> bool:
    """Whether the shortest prompt has the same logits beside the longest as alone.

    It has not if a model's positions or states start with the padding.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    alone_V = _first_logits(model, [shortest])
    beside_V = _first_logits(model, [shortest, longest])
    near = max(TOLERANCE, SPACINGS * torch.finfo(model.dtype).eps) * alone_V.abs().max()
    return bool((alone_V - beside_V).abs().max() <= near)


def _first_logits(model: Any, prompts: Sequence[Tokens]) -> Tensor:
    """The logits of the first new token of the first prompt, (V,)."""
    ids_BL, mask_BL = (tensor.to(model.device) for tensor in left_padded(prompts))
    result = model.generate(
        ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.logits[0][0].float()


def distinct(replies: Sequence[Tokens], size: int) -> float:
    """Different n-grams of `size` tokens per n-gram of all replies; NaN if there are none."""
    counts: Counter[tuple[int, ...]] = Counter()
    for ids in replies:
        counts.update(zip(*(ids[start:] for start in range(size)), strict=False))
    return len(counts) / counts.total() if counts else float("nan")
