"""The interface of a task: model class, labels, encoding, collation, loss, metrics.

A row is one prediction: one row of logits, compared with one label. A classifier predicts one row
for each example, a language model one for each token that it is trained to predict; only these
rows enter losses and metrics.

Shapes: B = examples in a batch, L = tokens of the longest example, C = classes or vocabulary,
N = rows.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from datasets import Dataset, Value
from torch import Tensor
from transformers import PreTrainedConfig

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.batch import Batch
from distill.tasks.labels import Labels
from distill.tasks.serving import Serving
from distill.tasks.special_tokens import CLASSIFICATION_TOKENS


class Task(Serving, ABC):
    """One kind of problem; a recipe names it as `task._target_`.

    An instance holds its arguments. Loading data returns a copy that is bound to the labels of the
    data (:meth:`with_labels`).

    Args:
        max_length: Tokens of an encoded example, special tokens included.
    """

    auto_class: ClassVar[str]  # auto class of transformers for its models
    primary_metric: ClassVar[str]  # metric of :meth:`compute_metrics` that selects a checkpoint
    maximize: ClassVar[bool]  # whether a larger primary metric is better
    divergences: ClassVar[tuple[str, ...]]  # functions of distill.losses; the first is the default

    # Whether `select_rows` only indexes positions, so that it can index hidden states too.
    selects_positions: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = True  # whether the label column is read
    label_feature: ClassVar[Any] = Value("int64")  # type of the column `labels` after encoding

    max_length: int
    names: tuple[str, ...] = ()  # label names in the order of their ids, once bound

    # ---- labels

    def read_labels(self, train: Dataset, data: Data) -> Labels:
        """Read the label names, or the spread of numbers, from the data.

        Args:
            train: The training split of the source, before any checks.
            data: Names the label column, and may list the labels.
        """
        return Labels()

    def with_labels(self, labels: Labels) -> Self:
        """Return a copy of the task that is bound to these labels."""
        bound = copy.copy(self)
        bound.names = labels.names
        return bound

    def parse_label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        """Parse one cell of the label column.

        Args:
            cell: The value in the source.
            declared: Names that the column's type declares, in the order of their ids.

        Returns:
            The label's name, a list of names, or a number; None if the example is unlabelled.

        Raises:
            ValueError: The message says what the cell should be.
        """
        raise NotImplementedError(f"{type(self).__name__} uses no labels")

    # ---- models

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` and of configs: num_labels, id2label, ..."""

    def adapt_config(self, config: PreTrainedConfig) -> None:
        """Change a model's config in place, if needed, before the model is built."""

    def special_tokens(self) -> dict[str, str]:
        """Special tokens of a tokenizer that is trained for the task, by name."""
        return CLASSIFICATION_TOKENS

    # ---- data

    @abstractmethod
    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """Tokenize a batch of raw examples; a function for `datasets.map`.

        Returns:
            Columns `input_ids`, `labels`, `size` (see :class:`Batch`), `length` (tokens), `rows`,
            `truncated` (1 if a text was too long, at most once per text). If a text can become
            several examples, also `first_window`, which is 1 for the first of them.
        """

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """Stack encoded examples, padded on the right to the longest, into one batch."""

    # ---- predictions

    @abstractmethod
    def select_rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """Select the rows from a model's logits.

        Args:
            logits: (B, C) or (B, L, C).
            batch: The batch that the model was called on.

        Returns:
            (N, C), example by example.
        """

    @abstractmethod
    def label_loss(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row against its label, (N,), in nats; exactly 0 where there is no label."""

    @abstractmethod
    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Inputs of :meth:`compute_metrics` for each example: tensors of shape (B, ...)."""

    @abstractmethod
    def compute_metrics(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Metrics over examples.

        Args:
            columns: Concatenated :meth:`outcomes`.

        Returns:
            Metrics by name, NaN if undefined.
        """

    @abstractmethod
    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """1 for rows in which both models make the same prediction, else 0, (N,)."""

    def divergence(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """The task's default divergence at temperature 1, (N,)."""
        return getattr(losses, self.divergences[0])(student_NC, teacher_NC, 1.0)

    def identity(self) -> list[str]:
        """The part of a stored result's key: class, arguments, and labels once bound."""
        return [
            f"{type(self).__module__}.{type(self).__qualname__}",
            repr(sorted(vars(self).items())),
        ]


def pad_column(examples: list[dict[str, Any]], column: str, value: int) -> Tensor:
    """One column of token ids, padded with `value` on the right, (B, L)."""
    longest = max(len(example[column]) for example in examples)
    return torch.tensor(
        [example[column] + [value] * (longest - len(example[column])) for example in examples],
        dtype=torch.long,
    )


def model_inputs(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Arguments of a model's forward, each (B, L): input_ids, attention_mask, token_type_ids.

    Token types are returned for pairs only: those of single texts are 0, the default of all models.
    """
    inputs = {"input_ids": pad_column(examples, "input_ids", pad_id)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    inputs["attention_mask"] = (
        torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
    ).long()
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = pad_column(examples, "token_type_ids", 0)
    return inputs


def check_max_length(max_length: Any, least: int, reason: str) -> int:
    """Return `max_length`; UserError if it is not an integer or below `least`."""
    if not isinstance(max_length, int) or max_length < least:
        raise UserError(
            f"task.max_length is {max_length}, but it must be an integer of at least {least}: "
            f"{reason}"
        )
    return max_length


def sum_per_example(values_N: Tensor, batch: Batch) -> Tensor:
    """Sum the values of rows over the example that each row belongs to, (B,)."""
    return torch.zeros(len(batch.size), dtype=values_N.dtype, device=values_N.device).index_add(
        0, batch.example, values_N
    )
