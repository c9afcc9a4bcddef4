"""The interface of a task: model class, labels, encoding, collation, loss, metrics.

A row is one prediction: one row of logits, compared with one label. A classifier predicts one row
for each example, a language model one for each token that it is trained to predict; only these
rows enter losses and metrics.

Shapes: B = examples in a batch, L = tokens of the longest example, C = classes or vocabulary,
N = rows.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from datasets import Dataset, Value
from torch import Tensor
from transformers import PreTrainedConfig

from distill import losses
from distill.errors import UserError
from distill.losses.chunked import LogitRows, full_logits, rows_in_chunks
from distill.recipe import targets
from distill.recipe.config import Data
from distill.tasks import class_weights
from distill.tasks.batch import Batch, join_columns, sum_per_example
from distill.tasks.labels import Labels, Names
from distill.tasks.serving import Serving
from distill.tasks.special_tokens import CLASSIFICATION_TOKENS
from distill.tasks.text_reading import TextReading

# Values of the column `truncated`: a text was truncated or split, its prompt lost its beginning, a
# conversation was cut at turns.
SPLIT, SHORTENED, TURNS = 1, 2, 4


class Task(TextReading, Serving, ABC):
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
    # Whether the classes are the tokens of the vocabulary, which teacher and student must share.
    predicts_tokens: ClassVar[bool] = False
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
        bound.names = Names(labels.names)
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
            `truncated` (0, or what was done to a text that was too long: the sum of SPLIT,
            SHORTENED and TURNS, at most once per text). If a text can become several examples, also
            `first_window`, which is 1 for the first of them.
        """

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        """Stack encoded examples, padded on the right to the longest, into one batch.

        Args:
            examples: Rows of :meth:`encode`; lists of integers may be NumPy arrays.
            pad_id: Id of the padding token.
        """

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

    def class_weights(self, weights: Any, cells: Iterable[Any] | None) -> list[float] | None:
        """Factors of the label loss by class, in the order of `names`.

        Args:
            weights: `loss.class_weights` of the recipe.
            cells: Labels of the training examples, which `balanced` counts.

        Raises:
            UserError: The weights do not fit the labels.
        """
        if weights is None:
            return None
        if not self.names:
            raise UserError(
                f"loss.class_weights is {weights}, but {type(self).__name__} has no classes: "
                "leave it out"
            )
        if weights != "balanced":
            return class_weights.in_order(weights, self.names)
        if cells is None:
            raise UserError(
                "loss.class_weights is balanced, but there are no training labels to count: "
                "give a factor for each label"
            )
        return self.balanced_weights(cells)

    def balanced_weights(self, cells: Iterable[Any]) -> list[float]:
        """Factors with which all classes weigh the same."""
        return class_weights.balanced_one_of_c(cells, self.names)

    def weighted_label_loss(self, logits_NC: Tensor, labels: Tensor, weights_C: Tensor) -> Tensor:
        """:meth:`label_loss` times the factor of each row's class, (N,)."""
        return self.label_loss(logits_NC, labels) * weights_C[labels.clamp(min=0)]

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Inputs of :meth:`compute_metrics` for each example: tensors of shape (B, ...).

        By default those of :meth:`row_outcomes`, summed over the rows of each example; evaluation
        then needs only some rows of logits at a time.
        """
        return self.sum_outcomes(self.row_outcomes(logits_NC, batch.labels), batch)

    def row_outcomes(self, logits_NC: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What a row contributes to the outcomes of its example, each (N,)."""
        raise NotImplementedError(
            f"{type(self).__name__} defines neither outcomes nor row_outcomes"
        )

    def sum_outcomes(self, columns_N: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Outcomes of examples from those of their rows."""
        return {name: sum_per_example(column, batch) for name, column in columns_N.items()}

    def outcomes_of(
        self, rows: LogitRows, batch: Batch, classes: int | None = None
    ) -> dict[str, Tensor]:
        """The outcomes of a batch from rows of logits or their factors, some rows at a time.

        Args:
            rows: Rows that :meth:`select_rows` selected.
            batch: The batch that the model was called on.
            classes: Number of leading logits that count; None: all.
        """
        if not self.has_row_outcomes():
            return self.outcomes(full_logits(rows)[:, :classes].float(), batch)
        parts = [
            self.row_outcomes(logits_nC[:, :classes].float(), batch.labels[part])
            for part, (logits_nC,) in rows_in_chunks(rows)
        ]
        return self.sum_outcomes(join_columns(parts), batch)

    def has_row_outcomes(self) -> bool:
        """Whether outcomes are sums over rows, so that not all logits are needed at once."""
        return type(self).outcomes is Task.outcomes

    def compute_metrics(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Metrics over examples: :meth:`weighted_metrics` of equal weights, unless overridden.

        Args:
            columns: Concatenated :meth:`outcomes`.

        Returns:
            Metrics by name, NaN if undefined; the primary metric alone if nothing is defined.
        """
        first = next(iter(columns.values()))
        ones_N1 = torch.ones(len(first), 1, dtype=torch.double, device=first.device)
        metrics = {
            name: float(value) for name, value in self.weighted_metrics(columns, ones_N1).items()
        }
        if math.isnan(metrics[self.primary_metric]) and all(map(math.isnan, metrics.values())):
            return {self.primary_metric: math.nan}
        return metrics

    def weighted_metrics(self, columns: dict[str, Tensor], weights_NR: Tensor) -> dict[str, Tensor]:
        """Metrics over examples that count several times or not at all, for each set of weights.

        A task without it defines :meth:`compute_metrics`, which is then called for each resample of
        a confidence interval.

        Args:
            columns: Concatenated :meth:`outcomes` of N examples.
            weights_NR: R sets of weights, in float64.

        Returns:
            Metrics by name, each (R,), NaN where undefined.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither compute_metrics nor weighted_metrics"
        )

    def has_weighted_metrics(self) -> bool:
        """Whether the metrics of many resamples can be computed at once."""
        return type(self).compute_metrics is Task.compute_metrics

    @abstractmethod
    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """1 for rows in which both models make the same prediction, else 0, (N,)."""

    def class_indicators(self, logits_NC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Predicted and true classes of labelled rows, to detect another order of the classes.

        Returns:
            1 for each predicted and each true class, (N, C); (N, 1) numbers; None without either.
        """
        return None

    def divergence(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """The task's default divergence at temperature 1, (N,)."""
        return getattr(losses, self.divergences[0])(student_NC, teacher_NC, 1.0)

    def identity(self) -> list[str]:
        """The part of a stored result's key: class, arguments, and labels once bound."""
        return [
            f"{type(self).__module__}.{type(self).__qualname__}",
            repr(sorted(vars(self).items())),
        ]


def build_task(spec: dict[str, Any]) -> Task:
    """The task of a recipe, from its key `task`; UserError if it is none."""
    return targets.instantiate("task", spec, Task)  # type: ignore[type-abstract]


def check_max_length(max_length: Any, least: int, reason: str) -> int:
    """Return `max_length`; UserError if it is not an integer or below `least`."""
    if type(max_length) is not int or max_length < least:
        raise UserError(
            f"task.max_length is {max_length!r}, but it must be an integer of at least {least}: "
            f"{reason}"
        )
    return max_length
