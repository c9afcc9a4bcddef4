"""The next token: one row of logits for each predicted token.

Shapes: B = examples (windows of texts), L = tokens of the longest, N = predicted tokens,
C = vocabulary.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor
from transformers import PreTrainedConfig

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import SHORTENED, SPLIT, Task, check_max_length
from distill.tasks.batch import Batch
from distill.tasks.collation import model_inputs, pad_column
from distill.tasks.generation import TextGeneration, start_token
from distill.tasks.special_tokens import LANGUAGE_TOKENS


class CausalLanguageModelling(TextGeneration, Task):
    """Predicts each token from the tokens before it.

    With one text column every token is predicted. With two, the first is a prompt, which is context
    only, and the second its completion, to which the end-of-text token is appended. The beginning-
    or end-of-text token precedes each text, so that its first token is predicted too, unless the
    tokenizer has neither.

    Texts longer than `max_length` are split into windows that overlap by one token, which is
    context in the second. A prompt that does not fit with its completion loses its beginning, down
    to half a window; a completion that does not fit beside that half is split into windows, each
    with the half before it as context. Each token is predicted exactly once: the number of
    predicted tokens does not depend on `max_length`. Windows without predicted tokens are left out.

    Args:
        max_length: Tokens of a window.
    """

    auto_class = "AutoModelForCausalLM"
    primary_metric = "perplexity"
    maximize = False
    divergences = losses.ONE_OF_C
    selects_positions = True
    predicts_tokens = True
    uses_labels = False
    label_feature = List(Value("int64"))

    def __init__(self, max_length: int = 256) -> None:
        self.max_length = check_max_length(
            max_length, 2, "a window holds a context and a token to predict"
        )

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def adapt_config(self, config: PreTrainedConfig) -> None:
        """Make an encoder attend to earlier tokens only: it must not see what it predicts."""
        if config.to_dict().get("is_decoder") is False:
            config.is_decoder = True

    def special_tokens(self) -> dict[str, str]:
        return LANGUAGE_TOKENS

    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """Tokenize texts into windows.

        `labels` holds the token at each position, or -100 for context; `size` is the number of
        UTF-8 bytes of the predicted tokens. `first_window` is 1 for the first window of a text;
        `truncated` of the first is SPLIT if there are several, plus SHORTENED if the prompt lost
        its beginning.
        """
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "input_ids",
                "labels",
                "size",
                "length",
                "rows",
                "truncated",
                "first_window",
            )
        }
        texts = zip(*(_tokenize(examples[column], tokenizer) for column in data.text), strict=True)
        start = start_token(tokenizer)
        for parts in texts:
            for window in self._windows(list(parts), start, tokenizer.eos_token_id):
                for name, value in window.items():
                    columns[name].append(value)
        return columns

    def _windows(
        self, parts: list["_Tokens"], start: list[int], end: int | None
    ) -> Iterator[dict[str, Any]]:
        """The windows of a text, or of a prompt and its completion."""
        if len(parts) == 1:
            return _windows(_with_context(start, parts[0]), self.max_length)
        prompt, (ids, _, sizes) = parts
        if end is not None:
            ids, sizes = [*ids, end], [*sizes, 0]
        text = _with_context([*start, *prompt.ids], _Tokens(ids, ids, sizes))
        return _completion_windows(text, start, self.max_length)

    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """Pad the windows; the logits at position i are compared with the label at i + 1."""
        labels_BL = _shift(pad_column(examples, "labels", losses.IGNORED))
        positions = torch.from_numpy(np.flatnonzero(labels_BL.numpy() != losses.IGNORED))
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=labels_BL.flatten()[positions],
            positions=positions,
            example=positions // labels_BL.shape[1],
            size=torch.tensor([example["size"] for example in examples]),
            rows=len(positions),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def select_rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.flatten(0, 1)[batch.positions]

    # The function itself, by which `distill.losses.fused` recognizes it.
    label_loss = staticmethod(losses.cross_entropy)  # type: ignore[assignment]

    def row_outcomes(self, logits_NC: Tensor, labels: Tensor) -> dict[str, Tensor]:
        correct_N = (logits_NC.argmax(-1) == labels).float()
        nll_N = self.label_loss(logits_NC, labels)
        return {"nll": nll_N, "tokens": torch.ones_like(correct_N), "correct": correct_N}

    def sum_outcomes(self, columns_N: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return super().sum_outcomes(columns_N, batch) | {"bytes": batch.size}

    def compute_metrics(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Perplexity, bits per UTF-8 byte, loss in nats per token, share of correct tokens."""
        nll, tokens, correct, size = (
            float(columns[name].double().sum()) for name in ("nll", "tokens", "correct", "bytes")
        )
        if tokens == 0:
            return {self.primary_metric: math.nan}
        return {
            "perplexity": math.exp(min(nll / tokens, 700)),
            "bits_per_byte": nll / math.log(2) / size if size else math.nan,
            "nll": nll / tokens,
            "accuracy": correct / tokens,
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


class _Tokens(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    labels: list[int]  # the same, -100 where a token is context only
    sizes: list[int]  # UTF-8 bytes of each


def _tokenize(texts: list[str | None], tokenizer: Any) -> list[_Tokens]:
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is {type(tokenizer).__name__}, but the offset of each token in "
            "the text is needed: use a fast tokenizer"
        )
    filled = [text or "" for text in texts]
    tokens = tokenizer(
        filled,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    encoded = zip(filled, tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return [_Tokens(ids, ids, _byte_sizes(text, offsets)) for text, ids, offsets in encoded]


def _byte_sizes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes of each token; their sum is the size of the text.

    Characters between two tokens count towards the later one, those after the last token towards
    the last. A character that spans several tokens counts towards the first of them.
    """
    edges = [0]
    for _, end in offsets[:-1]:
        edges.append(max(edges[-1], end))
    edges.append(len(text))
    return [len(text[start:end].encode()) for start, end in pairwise(edges)][: len(offsets)]


def _with_context(context: list[int], text: _Tokens) -> _Tokens:
    """The text after tokens that are not predicted."""
    return _Tokens(
        [*context, *text.ids],
        [losses.IGNORED] * len(context) + text.ids,
        [0] * len(context) + text.sizes,
    )


def _windows(text: _Tokens, max_length: int) -> Iterator[dict[str, Any]]:
    """Encoded examples of a text, without those that have no predicted token."""
    first = True
    for start in range(0, len(text.ids) - 1, max_length - 1):
        end = start + max_length
        window = _window(text, text.ids[start : start + 1], slice(start + 1, end))
        if window["rows"]:
            truncated = SPLIT if first and len(text.ids) > max_length else 0
            yield window | {"truncated": truncated, "first_window": int(first)}
            first = False


def _completion_windows(
    text: _Tokens, start: list[int], max_length: int
) -> Iterator[dict[str, Any]]:
    """Encoded examples of a prompt and its completion; `start` precedes every context."""
    size, half = len(text.ids), max(1, max_length // 2)
    # Without any context, the first token is the context of the second.
    prompt = max(1, sum(label == losses.IGNORED for label in text.labels))
    position = prompt
    while position < size:
        room = min(position, max(max_length - (size - position), half))
        context = text.ids[position - room : position]
        if room < position and room > len(start):
            context = [*start, *context[len(start) :]]
        end = min(size, position + max_length - room)
        first = position == prompt
        truncated = (SPLIT if end < size else 0) + (SHORTENED if room < prompt else 0)
        yield _window(text, context, slice(position, end)) | {
            "truncated": truncated if first else 0,
            "first_window": int(first),
        }
        position = end


def _window(text: _Tokens, context: list[int], predicted: slice) -> dict[str, Any]:
    """An encoded example: some tokens of a text after their context."""
    ids, labels = [*context, *text.ids[predicted]], text.labels[predicted]
    return {
        "input_ids": ids,
        "labels": [losses.IGNORED] * len(context) + labels,
        "length": len(ids),
        "rows": sum(label != losses.IGNORED for label in labels),
        "size": sum(text.sizes[predicted]),
    }


def _shift(labels_BL: Tensor) -> Tensor:
    """The label for the logits at each position, (B, L), -100 if there is none."""
    return torch.nn.functional.pad(labels_BL[:, 1:], (0, 1), value=losses.IGNORED)
