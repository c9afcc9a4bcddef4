"""What an export needs besides the student's folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor

from distill import data
from distill.recipe import config
from distill.tasks.base import Task

CALIBRATION = 128  # training examples for the ranges of activations


@dataclass(frozen=True)
class ExportSpec:
    """What an export needs besides the student's folder.

    Args:
        settings: the recipe's section `export`.
        data: the recipe's section `data`, which names the columns.
        task: bound to the labels of the data.
        tokenizer: the student's tokenizer.
        train: the raw training split; `quantize=static` calibrates on some of its examples.
    """

    settings: config.Export
    data: config.Data
    task: Task
    tokenizer: Any
    train: Dataset

    def calibration_inputs(self) -> Iterator[dict[str, Tensor]]:
        """Inputs of examples spread over the training split, one at a time, so without padding."""
        count = min(CALIBRATION, len(self.train))
        indices = [index * len(self.train) // count for index in range(count)]
        raw = DatasetDict({"train": self.train.select(indices)})
        encoded = data.encode(raw, self.task, self.tokenizer, self.data)["train"]
        for example in encoded:
            yield self.task.collate([example], self.tokenizer.pad_token_id).inputs
