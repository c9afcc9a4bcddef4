"""One class per text or pair of texts.

Shapes: N = examples, C = classes.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import one_hot

from distill import losses
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import class_metrics, labels
from distill.tasks.base import Task, check_max_length
from distill.tasks.batch import Batch
from distill.tasks.collation import model_inputs
from distill.tasks.labels import Labels
from distill.tasks.text_classes import TextClassification
from distill.tasks.words import encode_words


class SingleLabelClassification(TextClassification, Task):
    """One of several classes per text.

    Args:
        max_length: Tokens to which a text or pair is truncated, special tokens included.
    """

    auto_class = "AutoModelForSequenceClassification"
    primary_metric = "accuracy"
    maximize = True
    divergences: ClassVar[tuple[str, ...]] = losses.ONE_OF_C
    problem_type = "single_label_classification"

    def __init__(self, max_length: int = 128) -> None:
        self.max_length = check_max_length(
            max_length, 3, "texts are truncated to that many tokens, special ones included"
        )

    def read_labels(self, train: Dataset, data: Data) -> Labels:
        names = labels.read_names(train, data)
        if len(names) < 2:
            raise UserError(
                f"the labels are {labels.shorten(names)} only, but a classifier needs at least 2: "
                "list them all in data.labels"
            )
        return Labels(names)

    def parse_label(self, cell: Any, declared: Sequence[str] | None) -> Any:
        return labels.parse_label(cell, self.names, declared)

    def model_kwargs(self) -> dict[str, Any]:
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
        # One side of a pair may be empty.
        texts = [[text or "" for text in examples[column]] for column in data.text]
        words = encode_words(tokenizer, texts[0], self.max_length) if len(texts) == 1 else None
        ids, truncated, types = words or _encode_texts(tokenizer, texts, self.max_length)
        cells = examples.get(data.label_column or "", [None] * len(ids))
        columns = {"input_ids": ids, "labels": [self._target(cell) for cell in cells]}
        if types is not None:
            columns["token_type_ids"] = types
        return columns | {
            "size": [1] * len(ids),
            "length": [len(row) for row in ids],
            "rows": [1] * len(ids),
            "truncated": truncated,
        }

    def _target(self, cell: Any) -> Any:
        """The value of the column `labels`: a class id."""
        name = self.parse_label(cell, None)
        return losses.IGNORED if name is None else self.names.index(name)

    def collate(self, examples: list[dict[str, Any]], pad_id: int) -> Batch:
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=torch.tensor([example["labels"] for example in examples]),
            positions=None,
            example=torch.arange(len(examples)),
            size=torch.tensor([example["size"] for example in examples]),
            rows=len(examples),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def select_rows(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits

    def label_loss(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(logits_NC, labels)

    def class_indicators(self, logits_NC: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        classes = logits_NC.shape[1]
        return one_hot(logits_NC.argmax(-1), classes), one_hot(labels, classes)

    def outcomes(self, logits_NC: Tensor, batch: Batch) -> dict[str, Tensor]:
        confidence, prediction = logits_NC.softmax(-1).max(-1)
        return {
            "label": batch.labels,
            "prediction": prediction,
            "confidence": confidence,
            "nll": self.label_loss(logits_NC, batch.labels),
        }

    def weighted_metrics(self, columns: dict[str, Tensor], weights_NR: Tensor) -> dict[str, Tensor]:
        """Accuracy, F1, Matthews correlation, mean loss in nats, calibration error, F1 by class.

        Classes without examples have no F1.
        """
        labelled_N = columns["label"] != losses.IGNORED
        columns, weights_NR = keep_rows(columns, labelled_N), weights_NR[labelled_N]
        label, prediction = columns["label"], columns["prediction"]
        counts = class_metrics.count_one_of_c(prediction, label, len(self.names), weights_NR)
        rows_R, right_N = weights_NR.sum(0), prediction == label
        return {
            "accuracy": right_N.double() @ weights_NR / rows_R,
            "macro_f1": counts.macro_f1(),
            "mcc": class_metrics.matthews_correlation(counts, rows_R),
            "nll": columns["nll"].double() @ weights_NR / rows_R,
            "ece": class_metrics.calibration_error(columns["confidence"], right_N, weights_NR),
        } | counts.f1_by_name(self.names)

    def agreement(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


def keep_rows(columns: dict[str, Tensor], keep_N: Tensor) -> dict[str, Tensor]:
    """The rows of every column where `keep_N` is True."""
    return {name: column[keep_N] for name, column in columns.items()}


def _encode_texts(
    tokenizer: Any, texts: list[list[str]], max_length: int
) -> tuple[list[list[int]], list[int], list[list[int]] | None]:
    """Token ids of truncated texts or pairs, 1 for each that is, and token types of pairs."""
    pairs = len(texts) == 2
    tokens = tokenizer(
        *texts,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=None if pairs else False,
        return_attention_mask=False,
        return_overflowing_tokens=not tokenizer.is_fast,
    )
    types = tokens["token_type_ids"] if pairs and "token_type_ids" in tokens else None
    return tokens["input_ids"], _truncated(tokens), types


def _truncated(tokens: Any) -> list[int]:
    """1 for each text that the tokenizer truncated."""
    if tokens.encodings is None:
        return [int(count > 0) for count in tokens["num_truncated_tokens"]]
    return [int(bool(encoding.overflowing)) for encoding in tokens.encodings]
