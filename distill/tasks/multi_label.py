"""Any number of classes per text or pair of texts.

Shapes: N = examples, C = classes.
"""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, List, Value
from torch import Tensor
from torchmetrics.functional import classification as metrics

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import labels
from distill.tasks.batch import Batch
from distill.tasks.classification import ECE_BINS, SingleLabelClassification, keep_rows
from distill.tasks.labels import Labels

_LISTS = "JSON lines and Parquet can hold lists, CSV cannot"


class MultiLabelClassification(SingleLabelClassification):
    """Any number of classes per text.

    A cell of the label column holds the names of its classes, or a 0 or 1 for each class.

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

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "label": batch.labels,
            "probability": logits_NC.sigmoid(),
            "nll": self.label_loss(logits_NC, batch.labels),
        }

    def compute_metrics(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """F1, Matthews correlation, exact matches, loss in nats, calibration error, F1 by class."""
        columns = keep_rows(columns, ~columns["label"].isnan().any(-1))
        label, probability = columns["label"].long(), columns["probability"]
        if len(label) == 0:
            return {self.primary_metric: math.nan}
        predictions = probability, label, len(self.names)
        f1_C, macro, micro = (
            metrics.multilabel_f1_score(*predictions, average=average, validate_args=False)
            for average in ("none", "macro", "micro")
        )
        mcc = metrics.multilabel_matthews_corrcoef(*predictions, validate_args=False)
        ece = metrics.binary_calibration_error(
            probability.flatten(), label.flatten(), ECE_BINS, validate_args=False
        )
        return {
            "macro_f1": float(macro),
            "micro_f1": float(micro),
            "mcc": float(mcc),
            "exact_match": float(((probability > 0.5) == label).all(-1).float().mean()),
            "nll": float(columns["nll"].mean()),
            "ece": float(ece),
        } | {
            f"f1/{name}": float(value)
            for name, value in zip(self.names, f1_C.reshape(-1), strict=True)
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return ((student_NC > 0) == (teacher_NC > 0)).all(-1).float()


def _read_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """Label names; 0, 1, 2, ... for lists of 0 and 1 without names."""
    if data.labels is not None or data.label is None or labels.declared(train.features[data.label]):
        return labels.read_names(train, data)
    cells = [cell for cell in train[data.label][:] if isinstance(cell, list)]
    if any(isinstance(value, str) for cell in cells for value in cell):
        return tuple(sorted({str(value) for cell in cells for value in cell}))
    longest = max(map(len, cells), default=0)
    if longest == 0:
        raise UserError(
            f"column {data.label!r} holds no list of labels, but a text may have several: "
            f"give lists of names or of 0 and 1; {_LISTS}"
        )
    return tuple(map(str, range(longest)))
