"""Any number of classes per text or pair of texts.

Shapes: N = examples, C = classes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, List, Value
from torch import Tensor

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import class_metrics, class_weights, labels
from distill.tasks.batch import Batch
from distill.tasks.classification import SingleLabelClassification, keep_rows
from distill.tasks.labels import Labels

_LISTS = "JSON lines and Parquet can hold lists, a cell of CSV holds one in JSON"
CHUNK = 1000  # rows that are read at a time


class MultiLabelClassification(SingleLabelClassification):
    """Any number of classes per text.

    A cell of the label column holds a list of the names of its classes, or of a 0 or 1 for each
    class; or several columns hold 0 and 1, one for each class.

    Args:
        max_length: Tokens to which a text or pair is truncated, special tokens included.
    """

    primary_metric = "macro_f1"
    divergences = losses.ANY_OF_C
    problem_type = "multi_label_classification"
    label_feature = List(Value("float32"))

    def read_labels(self, train: Dataset, data: Data) -> Labels:
        return Labels(_read_names(train, data))

    def parse_label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        """The names of the classes, in the order of their ids.

        A list of numbers holds ids where the column declares names, else a 0 or 1 for each class.
        """
        cell = labels.parse_list(cell)
        if labels.is_missing(cell):
            return None
        if not isinstance(cell, list):
            raise ValueError(
                f"a cell must hold a list of names, or of 0 and 1: {_LISTS}; "
                "for one label per text, use SingleLabelClassification"
            )
        if declared is None and cell and not any(isinstance(value, str) for value in cell):
            return self._names_of_indicators(cell)
        names = {labels.parse_label(value, self.names, declared) for value in cell}
        return None if None in names else [name for name in self.names if name in names]

    def _names_of_indicators(self, cell: list[Any]) -> list[str] | None:
        if any(labels.is_missing(value) or value == labels.HIDDEN for value in cell):
            return None
        if len(cell) != len(self.names) or not all(value in (0, 1) for value in cell):
            raise ValueError(
                f"a list of numbers must hold a 0 or 1 for each of {labels.shorten(self.names)}: "
                "correct it, or list names"
            )
        return [name for name, value in zip(self.names, cell, strict=True) if value]

    def _target(self, cell: Any) -> list[float]:
        """The value of the column `labels`: a 0 or 1 for each class."""
        names = self.parse_label(cell, None)
        if names is None:
            return [math.nan] * len(self.names)
        return [float(name in names) for name in self.names]

    def label_loss(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.binary_cross_entropy(logits_NC, labels)

    def class_indicators(self, logits_NC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        return logits_NC.sigmoid(), labels

    def balanced_weights(self, cells: Iterable[Any]) -> list[float]:
        return class_weights.balanced_any_of_c(cells, self.names)

    def weighted_label_loss(self, logits_NC: Tensor, labels: Tensor, weights_C: Tensor) -> Tensor:
        """The loss in which labels that are 1 count as often as the factor of their class, (N,)."""
        return losses.binary_cross_entropy(logits_NC, labels, weights_C)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "label": batch.labels,
            "probability": logits_NC.sigmoid(),
            "nll": self.label_loss(logits_NC, batch.labels),
        }

    def weighted_metrics(self, columns: dict[str, Tensor], weights_NR: Tensor) -> dict[str, Tensor]:
        """F1, Matthews correlation, exact matches, loss in nats, calibration error, F1 by class.

        Classes without examples have no F1.
        """
        labelled_N = ~columns["label"].isnan().any(-1)
        columns, weights_NR = keep_rows(columns, labelled_N), weights_NR[labelled_N]
        label, probability = columns["label"].bool(), columns["probability"]
        prediction = probability > 0.5
        counts, rows_R = (
            class_metrics.count_any_of_c(prediction, label, weights_NR),
            weights_NR.sum(0),
        )
        return {
            "macro_f1": counts.macro_f1(),
            "micro_f1": counts.micro_f1(),
            "mcc": class_metrics.pooled_matthews_correlation(counts, rows_R),
            "exact_match": (prediction == label).all(-1).double() @ weights_NR / rows_R,
            "nll": columns["nll"].double() @ weights_NR / rows_R,
            "ece": class_metrics.calibration_error(probability, label, weights_NR),
        } | counts.f1_by_name(self.names)

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return ((student_NC > 0) == (teacher_NC > 0)).all(-1).float()


def _read_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """Label names; 0, 1, 2, ... for lists of 0 and 1 without names."""
    if isinstance(data.label, list):
        return _names_of_columns(data.label, data.labels)
    if data.labels is not None or data.label is None or labels.declared(train.features[data.label]):
        return labels.read_names(train, data)
    labels.check_no_objects(train, data.label)
    names, longest = set[str](), 0
    for batch in train.select_columns([data.label]).iter(CHUNK):
        for cell in map(labels.parse_list, batch[data.label]):
            if isinstance(cell, list):
                names.update(value for value in cell if isinstance(value, str))
                longest = max(longest, len(cell))
    if longest == 0:
        raise UserError(
            f"column {data.label!r} holds no list of labels, but a text may have several: "
            f"give lists of names or of 0 and 1 ({_LISTS}), or a column of 0 and 1 for each label"
        )
    labels.check_different(sorted(names), data.label)
    return tuple(sorted(names) if names else map(str, range(longest)))


def _names_of_columns(columns: list[str], names: list[str] | None) -> tuple[str, ...]:
    """The columns' own names, unless the recipe lists others in their order."""
    if names is not None and len(names) != len(columns):
        raise UserError(
            f"data.labels is {labels.shorten(names)}, but data.label has {len(columns)} columns: "
            "list a name for each in their order, or leave data.labels out"
        )
    return tuple(names or columns)
