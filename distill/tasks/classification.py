"""One row of logits per text or pair of texts: one label, several labels, or a number."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor
from torchmetrics.functional import classification as metrics
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import labels
from distill.tasks.base import Batch, Task, check_max_length, model_inputs

BINS = 15  # of the calibration error
LISTS = "JSON lines and Parquet can hold lists, CSV cannot"


class SingleLabelClassification(Task):
    """One of several classes per text."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    primary = "accuracy"
    maximise = True
    divergences: ClassVar[tuple[str, ...]] = losses.ONE_OF_C
    problem_type = "single_label_classification"

    def __init__(self, max_length: int = 128) -> None:
        self.max_length = check_max_length(
            max_length, 3, "texts are cut to that many tokens, special ones included"
        )

    def read_labels(self, train: Dataset, data: Data) -> None:
        self.names = labels.read_names(train, data)
        if len(self.names) < 2:
            raise UserError(
                f"the labels are {labels.shorten(self.names)} only, but a classifier needs at least 2: list them all in data.labels"
            )

    def label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        return labels.parse_label(cell, self.names, declared)

    def model_options(self) -> dict[str, Any]:
        ids = dict(enumerate(self.names))
        return {
            "num_labels": len(ids),
            "id2label": ids,
            "label2id": {name: number for number, name in ids.items()},
            "problem_type": self.problem_type,
        }

    def encode(
        self, examples: dict[str, list[Any]], tokenizer: Any, data: Data
    ) -> dict[str, list[Any]]:
        """Also `cut`: 1 where a text did not fit and lost its end."""
        texts = [
            [text or "" for text in examples[column]] for column in data.text
        ]  # a pair may have one side only
        pairs = len(texts) == 2
        tokens = tokenizer(
            *texts,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=None if pairs else False,
            return_attention_mask=False,
            return_overflowing_tokens=not tokenizer.is_fast,
        )
        ids = tokens["input_ids"]
        cells = examples[data.label] if data.label in examples else [None] * len(ids)
        columns = {"input_ids": ids, "labels": [self._target(cell) for cell in cells]}
        if pairs and "token_type_ids" in tokens:
            columns["token_type_ids"] = tokens["token_type_ids"]
        return columns | {
            "size": [1] * len(ids),
            "length": [len(row) for row in ids],
            "rows": [1] * len(ids),
            "cut": _cut(tokens),
        }

    def _target(self, cell: Any) -> Any:
        """A label as `labels` holds it."""
        name = self.label(cell, None)
        return losses.IGNORED if name is None else self.names.index(name)

    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=torch.tensor([example["labels"] for example in examples]),
            index=None,
            example=torch.arange(len(examples)),
            size=torch.tensor([example["size"] for example in examples]),
            rows=len(examples),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits

    def supervised(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(logits_NC, labels)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        confidence, prediction = logits_NC.softmax(-1).max(-1)
        return {
            "label": batch.labels,
            "prediction": prediction,
            "confidence": confidence,
            "nll": self.supervised(logits_NC, batch.labels),
        }

    def quality(self, columns: dict[str, Tensor]) -> dict[str, float]:
        columns = _labelled(columns, columns["label"] != losses.IGNORED)
        label, prediction = columns["label"], columns["prediction"]
        if len(label) == 0:
            return {self.primary: math.nan}
        correct, classes = prediction == label, len(self.names)
        each = metrics.multiclass_f1_score(
            prediction, label, classes, average="none", validate_args=False
        )
        return {
            "accuracy": float(correct.float().mean()),
            "macro_f1": float(
                metrics.multiclass_f1_score(
                    prediction, label, classes, average="macro", validate_args=False
                )
            ),
            "mcc": float(
                metrics.multiclass_matthews_corrcoef(
                    prediction, label, classes, validate_args=False
                )
            ),
            "nll": float(columns["nll"].mean()),
            "ece": float(
                metrics.binary_calibration_error(
                    columns["confidence"], correct.long(), BINS, validate_args=False
                )
            ),
        } | {f"f1/{name}": float(value) for name, value in zip(self.names, each, strict=True)}

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


class MultiLabelClassification(SingleLabelClassification):
    """Any number of classes per text. A cell holds the names of its classes, or a 0 or 1 for each class."""

    primary = "macro_f1"
    divergences = losses.ANY_OF_C
    problem_type = "multi_label_classification"
    label_feature = List(Value("float32"))

    def read_labels(self, train: Dataset, data: Data) -> None:
        self.names = _multi_names(train, data)

    def label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        """The names of the classes, in the order of their ids; a list of as many 0 and 1 as there are classes is read as such."""
        if labels.is_missing(cell):
            return None
        if not isinstance(cell, list):
            raise ValueError(
                f"a cell must hold a list of names, or of 0 and 1: {LISTS}; for one label a text, use SingleLabelClassification"
            )
        if declared is None and cell and not any(isinstance(value, str) for value in cell):
            return self._chosen(cell)
        chosen = {labels.parse_label(value, self.names, declared) for value in cell}
        return None if None in chosen else [name for name in self.names if name in chosen]

    def _chosen(self, cell: list[Any]) -> list[str] | None:
        if any(labels.is_missing(value) or value == labels.HIDDEN for value in cell):
            return None
        if len(cell) != len(self.names) or not all(value in (0, 1) for value in cell):
            raise ValueError(
                f"a list of numbers must hold a 0 or 1 for each of {labels.shorten(self.names)}: correct it, or list names"
            )
        return [name for name, value in zip(self.names, cell, strict=True) if value]

    def _target(self, cell: Any) -> list[float]:
        chosen = self.label(cell, None)
        return (
            [math.nan] * len(self.names)
            if chosen is None
            else [float(name in chosen) for name in self.names]
        )

    def supervised(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.binary_cross_entropy(logits_NC, labels)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "label": batch.labels,
            "probability": logits_NC.sigmoid(),
            "nll": self.supervised(logits_NC, batch.labels),
        }

    def quality(self, columns: dict[str, Tensor]) -> dict[str, float]:
        columns = _labelled(columns, ~columns["label"].isnan().any(-1))
        label, probability, classes = (
            columns["label"].long(),
            columns["probability"],
            len(self.names),
        )
        if len(label) == 0:
            return {self.primary: math.nan}
        each = metrics.multilabel_f1_score(
            probability, label, classes, average="none", validate_args=False
        )
        return {
            "macro_f1": float(
                metrics.multilabel_f1_score(
                    probability, label, classes, average="macro", validate_args=False
                )
            ),
            "micro_f1": float(
                metrics.multilabel_f1_score(
                    probability, label, classes, average="micro", validate_args=False
                )
            ),
            "mcc": float(
                metrics.multilabel_matthews_corrcoef(
                    probability, label, classes, validate_args=False
                )
            ),
            "exact_match": float(((probability > 0.5) == label).all(-1).float().mean()),
            "nll": float(columns["nll"].mean()),
            "ece": float(
                metrics.binary_calibration_error(
                    probability.flatten(), label.flatten(), BINS, validate_args=False
                )
            ),
        } | {
            f"f1/{name}": float(value)
            for name, value in zip(self.names, each.reshape(-1), strict=True)
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return ((student_NC > 0) == (teacher_NC > 0)).all(-1).float()


class Regression(SingleLabelClassification):
    """A number per text."""

    primary = "pearson"
    divergences = losses.NUMBERS
    problem_type = "regression"
    label_feature = List(Value("float32"))

    spread = 1.0  # standard deviation of the training labels

    def read_labels(self, train: Dataset, data: Data) -> None:
        if data.labels is not None:
            raise UserError(
                f"data.labels is {labels.shorten(data.labels)}, but a regression has no classes: leave it out"
            )
        if data.label is not None:
            numbers = [
                cell
                for cell in train[data.label][:]
                if isinstance(cell, int | float) and not labels.is_missing(cell)
            ]
            self.spread = float(np.std(numbers)) or 1.0 if numbers else 1.0

    def label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        if labels.is_missing(cell):
            return None
        if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
            raise ValueError(
                "the label of a regression must be a finite number: choose another column as data.label"
            )
        return float(cell)

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": self.problem_type}

    def _target(self, cell: Any) -> list[float]:
        number = self.label(cell, None)
        return [math.nan if number is None else number]

    def supervised(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.squared_error(logits_NC, labels)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"label": batch.labels[:, 0], "prediction": logits_NC[:, 0]}

    def quality(self, columns: dict[str, Tensor]) -> dict[str, float]:
        columns = _labelled(columns, ~columns["label"].isnan())
        label, prediction = columns["label"].double(), columns["prediction"].double()
        if len(label) == 0:
            return {self.primary: math.nan}
        return {
            "pearson": float(pearson_corrcoef(prediction, label)) if len(label) > 1 else math.nan,
            "spearman": float(spearman_corrcoef(prediction, label)) if len(label) > 1 else math.nan,
            "mse": float((prediction - label).square().mean()),
            "mae": float((prediction - label).abs().mean()),
        }

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """1 where the two numbers lie within a tenth of the training labels' standard deviation."""
        return ((student_NC - teacher_NC).abs() <= self.spread / 10).all(-1).float()


def _multi_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """As for one label a text, from the values in the cells' lists; lists of 0 and 1 name classes by their place."""
    if data.labels is not None or data.label is None or labels.declared(train.features[data.label]):
        return labels.read_names(train, data)
    cells = [cell for cell in train[data.label][:] if isinstance(cell, list)]
    if any(isinstance(value, str) for cell in cells for value in cell):
        return tuple(sorted({str(value) for cell in cells for value in cell}))
    widest = max(map(len, cells), default=0)
    if widest == 0:
        raise UserError(
            f"column {data.label!r} holds no list of labels, but a text may have several: give lists of names or of 0 and 1; {LISTS}"
        )
    return tuple(map(str, range(widest)))


def _labelled(columns: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    return {name: column[keep] for name, column in columns.items()}


def _cut(tokens: Any) -> list[int]:
    """1 for each text that was longer than the tokenizer was allowed to make it."""
    if tokens.encodings is None:
        return [int(lost > 0) for lost in tokens["num_truncated_tokens"]]
    return [int(bool(encoding.overflowing)) for encoding in tokens.encodings]
