"""A batch -> the stored outputs of the teacher: all logits, or the inputs of its head.

N = rows of a batch, B = examples, C = classes or vocabulary, D = width,
W = stored numbers per row.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import models
from distill.data import teacher_columns
from distill.errors import UserError
from distill.losses import chunked
from distill.tasks.base import Task
from distill.tasks.batch import Batch

Arrays = dict[str, pa.Array]
# numpy has no bfloat16: its bits are stored as int16.
NUMPY_DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
}


class TeacherOutputs(ABC):
    """The stored form of a teacher's outputs.

    Args:
        teacher: The teacher, in the dtype of its forward.
        task: Selects the rows.
    """

    identity: list[Any]  # part of the key in the store: settings besides teacher and examples
    width: int  # W
    dtype: Any = np.float32  # dtype of the stored numbers
    size: float  # maximum bytes of a row in the file

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        self.teacher, self.task, self.identity = teacher, task, []
        self.factors = task.selects_positions and models.has_linear_head(teacher)

    @abstractmethod
    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """Run the teacher on a batch.

        Args:
            batch: The batch, on the teacher's device.
            examples: Indices of its examples in the split.

        Returns:
            (N, W).
        """

    @abstractmethod
    def arrays(self, values_NW: np.ndarray) -> Arrays:
        """Arrow arrays of the rows, by column."""

    def columns(self, values_NW: np.ndarray, ends_B: np.ndarray) -> Arrays:
        """Arrow arrays with a list of rows for each example.

        Args:
            values_NW: The rows of all examples, example by example.
            ends_B: The index after the last row of each example.
        """
        offsets = pa.array(np.concatenate([[0], ends_B]), pa.int32())
        return {
            name: pa.ListArray.from_arrays(offsets, array)
            for name, array in self.arrays(values_NW).items()
        }

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        empty = self.columns(np.empty((0, self.width), self.dtype), np.empty(0, np.int64))
        return pa.schema({name: array.type for name, array in empty.items()})

    def _logit_rows(self, batch: Batch, classes: int | None = None) -> chunked.LogitRows:
        return models.logit_rows(
            self.teacher,
            batch.inputs,
            lambda logits: self.task.select_rows(logits, batch),
            classes,
            self.factors,
        )


class LogitOutputs(TeacherOutputs):
    """All logits, in float32."""

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        super().__init__(teacher, task)
        self.width = models.num_logits(teacher)
        self.size = 4 * self.width

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """The rows, on the CPU where all together are more than a chunk."""
        rows = models.evaluated_rows(
            self.teacher,
            batch.inputs,
            lambda logits: self.task.select_rows(logits, batch),
            self.factors,
        )
        if isinstance(rows, Tensor):
            return rows.float()
        return torch.cat([logits.float().cpu() for _, (logits,) in chunked.rows_in_chunks(rows)])

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.LOGITS: matrix(values_NW)}


class HiddenStateOutputs(TeacherOutputs):
    """The inputs of the teacher's head, in the teacher's dtype; the head turns them into logits."""

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        super().__init__(teacher, task)
        if not self.factors:
            raise UserError(
                f"teacher.outputs is hidden, but the logits of {type(teacher).__name__} are not "
                "the output of a linear head: set teacher.outputs=online"
            )
        self.identity, self.dtype = ["hidden"], NUMPY_DTYPES[teacher.dtype]
        self.width = teacher.get_output_embeddings().in_features
        self.size = self.width * teacher.dtype.itemsize

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        states_ND = models.head_inputs(
            self.teacher, batch.inputs, lambda states: self.task.select_rows(states, batch)
        )
        return states_ND.view(torch.int16) if states_ND.dtype == torch.bfloat16 else states_ND

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.STATES: matrix(values_NW)}


def matrix(values_NW: np.ndarray) -> pa.Array:
    """An array of rows of equal length, without a copy where they are contiguous."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NW.reshape(-1)), values_NW.shape[1])
