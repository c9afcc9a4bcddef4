"""Texts -> tokens -> windows: the encoded examples of a language model."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from distill import losses
from distill.errors import UserError
from distill.tasks.base import SHORTENED, SPLIT


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    labels: list[int]  # the same, -100 where a token is context only
    sizes: list[int]  # UTF-8 bytes of each


def check_fast(tokenizer: Any) -> None:
    """UserError if a tokenizer does not return where each token lies in the text."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is {type(tokenizer).__name__}, but the offset of each token in "
            "the text is needed: use a fast tokenizer"
        )


def tokenize(texts: list[str | None], tokenizer: Any) -> list[Tokens]:
    """The tokens of each text, all of them predicted."""
    check_fast(tokenizer)
    filled = [text or "" for text in texts]
    tokens = tokenizer(
        filled,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    encoded = zip(filled, tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return [Tokens(ids, ids, byte_sizes(text, offsets)) for text, ids, offsets in encoded]


def byte_sizes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes of each token; their sum is the size of the text.

    Characters between two tokens count towards the later one, those after the last token towards
    the last. A character that spans several tokens counts towards the first of them.
    """
    edges = [0]
    for _, end in offsets[:-1]:
        edges.append(max(edges[-1], end))
    edges.append(len(text))
    return [len(text[start:end].encode()) for start, end in pairwise(edges)][: len(offsets)]


def with_context(context: list[int], text: Tokens) -> Tokens:
    """The text after tokens that are not predicted."""
    return Tokens(
        [*context, *text.ids],
        [losses.IGNORED] * len(context) + text.ids,
        [0] * len(context) + text.sizes,
    )


def windows(text: Tokens, max_length: int) -> Iterator[dict[str, Any]]:
    """Encoded examples of a text, without those that have no predicted token."""
    first = True
    for start in range(0, len(text.ids) - 1, max_length - 1):
        end = start + max_length
        window = _window(text, text.ids[start : start + 1], slice(start + 1, end))
        if window["rows"]:
            truncated = SPLIT if first and len(text.ids) > max_length else 0
            yield window | {"truncated": truncated, "first_window": int(first)}
            first = False


def completion_windows(text: Tokens, start: list[int], max_length: int) -> Iterator[dict[str, Any]]:
    """Encoded examples of a text after a context; `start` precedes every context."""
    size, half = len(text.ids), max(1, max_length // 2)
    predicted = (index for index, label in enumerate(text.labels) if label != losses.IGNORED)
    # Without any context, the first token is the context of the second.
    prompt = max(1, next(predicted, size))
    position = prompt
    while position < size:
        room = min(position, max(max_length - (size - position), half))
        context = text.ids[position - room : position]
        if room < position and room > len(start):
            context = [*start, *context[len(start) :]]
        end = min(size, position + max_length - room)
        first = position == prompt
        truncated = (SPLIT if end < size else 0) + (SHORTENED if room < prompt else 0)
        window = _window(text, context, slice(position, end))
        if window["rows"]:
            yield window | {"truncated": truncated if first else 0, "first_window": int(first)}
        position = end


def _window(text: Tokens, context: list[int], predicted: slice) -> dict[str, Any]:
    """An encoded example: some tokens of a text after their context."""
    ids, labels = [*context, *text.ids[predicted]], text.labels[predicted]
    return {
        "input_ids": ids,
        "labels": [losses.IGNORED] * len(context) + labels,
        "length": len(ids),
        "rows": sum(label != losses.IGNORED for label in labels),
        "size": sum(text.sizes[predicted]),
    }
