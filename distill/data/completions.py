"""Encoded examples -> prompts, and examples whose completion a model has written."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distill import losses


class Room(NamedTuple):
    """How many tokens of an example are a prompt, and how many a completion."""

    prompt: int
    completion: int


def room(max_length: int, completion_tokens: int) -> Room:
    """The tokens of prompts and completions: at least half of an example is left for prompts."""
    completion = min(completion_tokens, max_length // 2)
    return Room(max_length - completion, completion)


def prompt_of(example: dict[str, Any], longest: int) -> list[int]:
    """The prompt of an encoded example: what comes before its last completion.

    A plain text has none: the first half of the example is then its prompt. The beginning of a
    prompt that is too long is left out.

    Args:
        example: `input_ids` and `labels`, -100 where a token is context.
        longest: Tokens of the prompt at most.
    """
    labels = [*example["labels"]]
    end = len(labels)
    while end > 1 and labels[end - 1] == losses.IGNORED:
        end -= 1
    start = end
    while start > 1 and labels[start - 1] != losses.IGNORED:
        start -= 1
    if start <= 1:
        start = max(1, end // 2)
    return [int(each) for each in example["input_ids"][max(0, start - longest) : start]]


def with_completion(
    example: dict[str, Any], prompt: Sequence[int], completion: Sequence[int]
) -> dict[str, Any]:
    """The example of a prompt and another completion, each token of which is predicted."""
    ids = [*prompt, *completion]
    return example | {
        "input_ids": ids,
        "labels": [losses.IGNORED] * len(prompt) + [*completion],
        "length": len(ids),
        "rows": len(completion),
    }
