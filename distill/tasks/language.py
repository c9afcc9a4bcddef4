"""The next token, again and again: one row of logits per predicted token."""

import math
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset, List, Value
from torch import Tensor

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Batch, Task, check_max_length, model_inputs, sum_per_example


class CausalLanguageModelling(Task):
    """Predicts each token from those before it.

    One text column: every token is predicted. Two: the first is a prompt, whose tokens are context only, and the second its
    completion, which ends in the end-of-text token. The beginning- or end-of-text token is put before the text, so that its
    first token has a context too; a tokenizer without one leaves the first token unpredicted.

    Texts longer than `max_length` are cut into windows that share one token, the last of a window being the context that the
    next begins with. So each token is predicted exactly once, and a text holds as many predicted tokens and bytes at any length
    of window. Windows in which nothing is predicted are left out.
    """

    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    primary = "perplexity"
    maximise = False
    divergences = losses.ONE_OF_C
    selects_positions = True
    uses_labels = False
    label_feature = List(Value("int64"))

    def __init__(self, max_length: int = 256) -> None:
        self.max_length = check_max_length(
            max_length, 2, "a window holds a context and a token to predict"
        )

    def read_labels(self, train: Dataset, data: Data) -> None:
        """The labels are the texts."""

    def model_options(self) -> dict[str, Any]:
        return {}

    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """`labels` holds the token at each place, -100 where it is context only; `size` the UTF-8 bytes of the predicted tokens.

        Also 1 for the first window of a text: `begins` for each, `cut` for one that took several.
        """
        columns: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "size", "length", "rows", "cut", "begins")
        }
        texts = zip(*(_tokens(examples[column], tokenizer) for column in data.text), strict=True)
        for parts in texts:
            for window in _windows(*_sequence(list(parts), tokenizer), self.max_length):
                for name, value in window.items():
                    columns[name].append(value)
        return columns

    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """The shift: the logits at place i answer for the label at place i + 1."""
        labels_BL = _shifted([example["labels"] for example in examples])
        counted = labels_BL != losses.IGNORED
        index = counted.flatten().nonzero()[:, 0]
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=labels_BL.flatten()[index],
            index=index,
            example=index // labels_BL.shape[1],
            size=torch.tensor([example["size"] for example in examples]),
            rows=len(index),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.flatten(0, 1)[batch.index]

    def supervised(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(logits_NC, labels)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        correct_N = (logits_NC.argmax(-1) == batch.labels).float()
        return {
            "nll": sum_per_example(self.supervised(logits_NC, batch.labels), batch),
            "tokens": sum_per_example(torch.ones_like(correct_N), batch),
            "correct": sum_per_example(correct_N, batch),
            "bytes": batch.size,
        }

    def quality(self, columns: dict[str, Tensor]) -> dict[str, float]:
        nll, tokens, correct, size = (
            float(columns[name].double().sum()) for name in ("nll", "tokens", "correct", "bytes")
        )
        if tokens == 0:
            return {self.primary: math.nan}
        return {
            "perplexity": math.exp(min(nll / tokens, 700)),
            "bits_per_byte": nll / math.log(2) / size if size else math.nan,
            "nll": nll / tokens,
            "accuracy": correct / tokens,
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


Piece = tuple[list[int], list[int]]  # token ids, and the bytes of each


def _tokens(texts: list[str | None], tokenizer: Any) -> list[Piece]:
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is {type(tokenizer).__name__}, but each token's place in the text must be known: use a fast tokenizer"
        )
    filled = [text or "" for text in texts]
    tokens = tokenizer(
        filled,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        (ids, _bytes(text, offsets))
        for text, ids, offsets in zip(
            filled, tokens["input_ids"], tokens["offset_mapping"], strict=True
        )
    ]


def _bytes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """The UTF-8 bytes of each token, so that together they are the text's.

    Characters between two tokens belong to the later one, and those after the last token to that one. A character that is
    spread over several tokens belongs to the first of them.
    """
    edges = [0]
    for _, end in offsets[:-1]:
        edges.append(max(edges[-1], end))
    edges.append(len(text))
    return [len(text[start:end].encode()) for start, end in pairwise(edges)][: len(offsets)]


def start_token(tokenizer: Any) -> list[int]:
    """What stands before every text, so that its first token has a context too; nothing where the tokenizer has no such token."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


def _sequence(parts: list[Piece], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and bytes of one text or one prompt with its completion, special tokens included."""
    prompt = parts[0][0] if len(parts) == 2 else []
    ids, sizes = parts[-1]
    if len(parts) == 2 and tokenizer.eos_token_id is not None:
        ids, sizes = [*ids, tokenizer.eos_token_id], [*sizes, 0]
    context = [*start_token(tokenizer), *prompt]
    return [*context, *ids], [*[losses.IGNORED] * len(context), *ids], [*[0] * len(context), *sizes]


def _windows(
    ids: list[int], labels: list[int], sizes: list[int], max_length: int
) -> list[dict[str, Any]]:
    windows: list[dict[str, Any]] = []
    for start in range(0, len(ids) - 1, max_length - 1):
        end = start + max_length
        predicted = slice(start + 1, end)
        rows = sum(label != losses.IGNORED for label in labels[predicted])
        if rows:
            tokens = ids[start:end]
            window = {
                "input_ids": tokens,
                "labels": [losses.IGNORED, *labels[predicted]],
                "length": len(tokens),
                "rows": rows,
            }
            first = not windows
            windows.append(
                window
                | {
                    "size": sum(sizes[predicted]),
                    "cut": int(first and len(ids) > max_length),
                    "begins": int(first),
                }
            )
    return windows


def _shifted(labels: list[list[int]]) -> Tensor:
    """What the logits at each place must predict, (B, L), -100 where nothing."""
    longest = max(map(len, labels))
    return torch.tensor(
        [[*row[1:], *[losses.IGNORED] * (longest - len(row) + 1)] for row in labels],
        dtype=torch.long,
    )
