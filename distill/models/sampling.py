"""Completions that a language model writes, drawn by uniform numbers that the caller chooses.

B = prompts of a batch, L = tokens of the longest, N = new tokens, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from distill import internals
from distill.models.forward import eval_mode


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    tokens: int  # of a completion at most
    stops: tuple[int, ...]  # ids that end a completion, which holds them
    temperature: float = 1.0  # of the logits; 0: the likeliest token
    classes: int | None = None  # number of leading logits that exist; None: all
    batch_size: int | None = None  # prompts at a time; None: all of a similar length
    cache: str | None = "static"  # a cache of `generate`; None: its default, which grows


@torch.no_grad()
def write_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Write one completion for each prompt.

    A token is drawn by one uniform number, from the inverse of the cumulative distribution. The
    numbers of a completion depend on its seed alone, and global generators are left as they are.

    Args:
        model: Writes, in eval mode.
        prompts: Ids, at least one of each.
        sampling: How completions are drawn.
        seeds: Of each completion: integers of at least 0.

    Returns:
        The new ids of each, the stop token included: at least one.
    """
    completions: list[list[int]] = [[]] * len(prompts)
    with eval_mode(model), _plain_settings(model):
        for numbers in _similar_lengths(prompts, sampling.batch_size):
            written = _write(
                model,
                [prompts[number] for number in numbers],
                sampling,
                [seeds[number] for number in numbers],
            )
            for number, ids in zip(numbers, written, strict=True):
                completions[number] = ids
    return completions


def _similar_lengths(
    prompts: Sequence[Sequence[int]], batch_size: int | None
) -> Iterator[list[int]]:
    """Indices of prompts whose lengths differ by less than a factor of 2, shortest first."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for _, group in groupby(order, key=lambda number: len(prompts[number]).bit_length()):
        numbers = list(group)
        size = batch_size or len(numbers)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The completions of a batch."""
    ids_BL, mask_BL = left_padded(prompts)
    longest = ids_BL.shape[1]
    uniform_BN = np.stack(
        [np.random.default_rng([*seed]).random(sampling.tokens) for seed in seeds]
    )
    draw = _Draw(torch.from_numpy(uniform_BN).to(model.device), longest, sampling)
    internals.forget_cache_length(model)
    # Compiled, each length would need a graph of its own.
    with torch.compiler.set_stance("force_eager"):
        written = model.generate(  # type: ignore[operator]
            ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.tokens,
                do_sample=False,  # the processor leaves one token
                eos_token_id=[*sampling.stops] or None,
                pad_token_id=0,
                cache_implementation=sampling.cache,
                disable_compile=True,
            ),
        )
    return [until_stop(ids, sampling.stops) for ids in written[:, longest:].tolist()]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids of prompts that end at the same place, and their mask, (B, L)."""
    longest = max(map(len, prompts))
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    return ids_BL, mask_BL


def until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids up to the first stop token."""
    return next((ids[: end + 1] for end, each in enumerate(ids) if each in stops), ids)


class _Draw(LogitsProcessor):
    """Leaves one token for each text: the one that its uniform number draws, or the likeliest."""

    def __init__(self, uniform_BN: Tensor, prompt_length: int, sampling: Sampling) -> None:
        self.uniform_BN, self.prompt_length, self.sampling = uniform_BN, prompt_length, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores[:, : self.sampling.classes]
        if self.sampling.temperature == 0:
            chosen_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            probs_BV = (logits_BV.double() / self.sampling.temperature).softmax(-1)
            total_BV = probs_BV.cumsum(-1)
            column = input_ids.shape[1] - self.prompt_length
            uniform_B1 = self.uniform_BN[:, column, None] * total_BV[:, -1:]
            chosen_B1 = torch.searchsorted(total_BV, uniform_B1, right=True)
            chosen_B1 = chosen_B1.clamp(max=logits_BV.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1, 0.0)


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Set a generation config without the model's penalties, which `generate` would merge."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
