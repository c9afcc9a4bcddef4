"""What differs between tasks, and nothing else: model class, encoding, collation, which logits count, labels, metrics.

Shapes: B = examples in a batch, L = tokens of the longest of them, C = classes or vocabulary,
N = rows of logits that count (one per example for classification, one per predicted token for language models).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset, Value
from torch import Tensor

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data


class CachedHidden(NamedTuple):
    """Cached hidden states, of which the teacher's head makes its logits."""

    states_ND: Tensor


class SparseTargets(NamedTuple):
    """Cached tokens of the teacher's distribution at the loss's temperature; see `distill/sparse.py`."""

    ids_NK: Tensor
    shares_NK: Tensor  # 0 for those that only fill up a row
    entropy_N: Tensor  # nats


class Batch(NamedTuple):
    """One micro-batch on its way to the loss. `rows` and `tokens` count the whole optimizer step, the loss's normalisers."""

    inputs: dict[str, Tensor]  # what the models take: input_ids, attention_mask, ... each (B, L)
    labels: Tensor  # (N,) or (N, C); -100 or NaN where a row has none
    # (N,) places in the flattened (B * L) logits that count; null: one row per example
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    example: Tensor  # (N,) the example, 0..B-1, that each row belongs to
    size: Tensor  # (B,) what an example weighs in its metrics: 1, or its UTF-8 bytes for language models
    teacher: Tensor | CachedHidden | SparseTargets | None = (
        None  # cached outputs, which the loader adds; a tensor: logits (N, C)
    )
    rows: float = 1.0  # rows of the global batch
    tokens: float = 1.0  # tokens of the global batch


class Task(ABC):
    """One kind of problem. A subclass holds its recipe arguments; `names` is filled by :meth:`read_labels`."""

    auto_class: ClassVar[str]  # the class of `transformers` that loads its models
    pipeline: ClassVar[str]  # the pipeline of `transformers` that serves them
    primary: ClassVar[str]  # the metric of :meth:`quality` that picks the best checkpoint
    maximise: ClassVar[bool]  # whether a larger primary metric is better
    divergences: ClassVar[
        tuple[str, ...]
    ]  # functions of distill.losses that suit its logits; the first is the default

    selects_positions: ClassVar[bool] = (
        False  # whether `rows` only picks places, so that it can do so in hidden states too
    )
    uses_labels: ClassVar[bool] = True  # whether the source must have a label column
    label_feature: ClassVar[Any] = Value("int64")  # how `encode` stores the labels of an example

    max_length: int  # tokens of an encoded example, special ones included
    names: tuple[str, ...] = ()  # label names in the order of their ids

    @abstractmethod
    def read_labels(self, train: Dataset, data: Data) -> None:
        """Set `names` from `data.labels`, from what the training split declares, or from the values it holds."""

    def label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        """One cell of the label column -> its name, names or number, None where it is unlabelled; ValueError says what it should be.

        `declared` are the names that the column's type declares, in the order of their ids.
        """
        raise NotImplementedError(f"{type(self).__name__} uses no labels")

    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` and of a config: num_labels, id2label, problem_type, ..."""

    @abstractmethod
    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """A batched `datasets.map` function: raw columns -> input_ids, labels, size, length (tokens) and rows."""

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """Encoded examples, padded to the longest of them on the right -> one batch."""

    @abstractmethod
    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """The model's logits, (B, C) or (B, L, C) -> the rows that count, (N, C), example by example."""

    @abstractmethod
    def supervised(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row against its label, (N,), in nats; exactly 0 where a row has no label."""

    @abstractmethod
    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What :meth:`quality` needs of each example: tensors whose first dimension is B."""

    @abstractmethod
    def quality(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of a set of examples, from their concatenated outcomes."""

    @abstractmethod
    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """1 where a row's prediction is the same for both models, 0 where not, (N,)."""

    def identity(self) -> list[str]:
        """What of the task decides a stored result: its class, its arguments and the labels that it has read."""
        return [
            f"{type(self).__module__}.{type(self).__qualname__}",
            repr(sorted(vars(self).items())),
        ]

    def divergence(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """The task's default divergence at temperature 1, (N,)."""
        return getattr(losses, self.divergences[0])(student_NC, teacher_NC, 1.0)


def pad_column(examples: list[dict[str, Any]], column: str, value: int) -> Tensor:
    """One column of token ids, padded on the right, (B, L)."""
    longest = max(len(example[column]) for example in examples)
    return torch.tensor(
        [example[column] + [value] * (longest - len(example[column])) for example in examples],
        dtype=torch.long,
    )


def model_inputs(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """What the models take. Token types are there for pairs only: 0, which single texts would hold, is every model's default."""
    inputs = {"input_ids": pad_column(examples, "input_ids", pad_id)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    inputs["attention_mask"] = (
        torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
    ).long()
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = pad_column(examples, "token_type_ids", 0)
    return inputs


def check_max_length(max_length: Any, least: int, reason: str) -> int:
    """`task.max_length`, refused where it is no whole number or too small."""
    if not isinstance(max_length, int) or max_length < least:
        raise UserError(
            f"task.max_length is {max_length}, but it must be at least {least}, a whole number: {reason}"
        )
    return max_length


def sum_per_example(values_N: Tensor, batch: Batch) -> Tensor:
    """Sums of rows over the examples that they belong to, (B,)."""
    return torch.zeros(len(batch.size), dtype=values_N.dtype, device=values_N.device).index_add(
        0, batch.example, values_N
    )
