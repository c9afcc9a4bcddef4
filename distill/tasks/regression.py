"""A number per text or pair of texts.

Shapes: N = examples.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from datasets import Dataset, List, Value
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import labels
from distill.tasks.batch import Batch
from distill.tasks.classification import SingleLabelClassification, keep_rows
from distill.tasks.labels import Labels


class Regression(SingleLabelClassification):
    """A number per text.

    Args:
        max_length: Tokens to which a text or pair is truncated, special tokens included.
    """

    primary_metric = "pearson"
    divergences = losses.NUMBERS
    problem_type = "regression"
    label_feature = List(Value("float32"))

    spread = 1.0  # standard deviation of the training labels, once bound

    def read_labels(self, train: Dataset, data: Data) -> Labels:
        if data.labels is not None:
            raise UserError(
                f"data.labels is {labels.shorten(data.labels)}, but a regression has no classes: "
                "leave it out"
            )
        labels.check_one_column(data)
        if data.label is None:
            return Labels()
        numbers = [
            cell
            for cell in train[data.label][:]
            if isinstance(cell, int | float) and not labels.is_missing(cell)
        ]
        return Labels(spread=float(np.std(numbers)) or 1.0 if numbers else 1.0)

    def with_labels(self, labels: Labels) -> Self:
        bound = super().with_labels(labels)
        if labels.spread is not None:
            bound.spread = labels.spread
        return bound

    def parse_label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        if labels.is_missing(cell):
            return None
        if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
            raise ValueError(
                "the label of a regression must be a finite number: "
                "choose another column as data.label"
            )
        return float(cell)

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": self.problem_type}

    def _target(self, cell: Any) -> list[float]:
        """The value of the column `labels`: one number."""
        number = self.parse_label(cell, None)
        return [math.nan if number is None else number]

    def label_loss(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.squared_error(logits_NC, labels)

    def class_indicators(self, logits_NC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        return logits_NC, labels

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"label": batch.labels[:, 0], "prediction": logits_NC[:, 0]}

    def compute_metrics(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Correlations, and mean squared and absolute error in the units of the label."""
        columns = keep_rows(columns, ~columns["label"].isnan())
        label, prediction = columns["label"].double(), columns["prediction"].double()
        if len(label) == 0:
            return {self.primary_metric: math.nan}
        return {
            "pearson": float(pearson_corrcoef(prediction, label)) if len(label) > 1 else math.nan,
            "spearman": float(spearman_corrcoef(prediction, label)) if len(label) > 1 else math.nan,
            "mse": float((prediction - label).square().mean()),
            "mae": float((prediction - label).abs().mean()),
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """1 where the numbers differ by at most a tenth of the labels' standard deviation, (N,)."""
        return ((student_NC - teacher_NC).abs() <= self.spread / 10).all(-1).float()
