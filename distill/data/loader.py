"""Micro-batches -> batches of tensors, in the order of a plan and from any position in it."""

import logging
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torch.utils import data as torch_data

from distill.data import teacher_columns
from distill.data.batches import Batching, BatchPlan, MicroBatch
from distill.data.prefetch import prefetch
from distill.errors import UserError
from distill.tasks.base import Task
from distill.tasks.batch import Batch, CachedHidden, SparseTargets

log = logging.getLogger(__name__)


def columns_to_examples(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn columns, as `Task.encode` returns them, into examples, as `Task.collate` takes them."""
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _columns(table: pa.Table) -> dict[str, list[Any]]:
    """The columns of an Arrow table, with lists of integers as arrays."""
    return {name: _cells(table.column(name)) for name in table.column_names}


def _cells(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)) or column.null_count:
        return column.to_pylist()
    cells: list[Any] = []
    for chunk in column.chunks:
        ends, values = chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)
        cells += [values[start:end] for start, end in pairwise(ends.tolist())]
    return cells


class EncodedDataset(torch_data.Dataset[Batch]):
    """Maps a micro-batch to a batch, with normalizers and cached outputs of the teacher.

    Args:
        split: Encoded examples, possibly with columns for the teacher.
        task: Collates the examples.
        pad_id: Id of the padding token.
        teacher_pad_id: That of a teacher with inputs of its own.
        multiple: Lengths are rounded up to a multiple of it, at most to the task's longest.
    """

    def __init__(
        self,
        split: Dataset,
        task: Task,
        pad_id: int,
        teacher_pad_id: int | None = None,
        multiple: int | None = None,
    ) -> None:
        self.task, self.pad_id, self.teacher_pad_id = task, pad_id, teacher_pad_id
        self.multiple = multiple
        cached = [name for name in split.column_names if name in teacher_columns.COLUMNS]
        self.teacher = split.select_columns(cached).with_format("arrow") if cached else None
        self.split = split.remove_columns(cached).with_format("arrow")

    def __getitem__(self, micro: MicroBatch) -> Batch:
        columns, inputs = teacher_columns.split_inputs(_columns(self.split[micro.indices]))
        batch = self._collate(columns, self.pad_id)
        if inputs and self.teacher_pad_id is not None:
            batch = batch._replace(teacher_batch=self._collate(inputs, self.teacher_pad_id))
        return batch._replace(
            teacher=self._teacher_outputs(micro.indices),
            rows=float(micro.rows),
            tokens=float(micro.tokens),
        )

    def _collate(self, columns: dict[str, list[Any]], pad_id: int) -> Batch:
        batch = self.task.collate(columns_to_examples(columns), pad_id)
        if self.multiple is not None:
            batch = self._lengthen(batch, pad_id, self.multiple)
        return batch._replace(padded=not batch.inputs["attention_mask"].numpy().all())

    def _lengthen(self, batch: Batch, pad_id: int, multiple: int) -> Batch:
        """Add padding up to a multiple."""
        length = batch.inputs["input_ids"].shape[1]
        target = max(length, min(-(-length // multiple) * multiple, self.task.max_length))
        inputs = {
            name: functional.pad(
                column, (0, target - length), value=pad_id if name == "input_ids" else 0
            )
            for name, column in batch.inputs.items()
        }
        positions = batch.positions
        if positions is not None:
            positions = positions // length * target + positions % length
        return batch._replace(inputs=inputs, positions=positions)

    def _teacher_outputs(self, indices: list[int]) -> Tensor | CachedHidden | SparseTargets | None:
        return None if self.teacher is None else teacher_columns.read_outputs(self.teacher[indices])


class Loader(torch_data.DataLoader[Batch]):
    """A DataLoader whose state is the position in an epoch, the same on all ranks.

    A run resumes from there with any number of ranks. Batches that worker processes, or else a
    thread, have prefetched do not count.
    """

    position = 0  # micro-batches of the epoch that have been yielded

    @property
    def plan(self) -> BatchPlan:
        """The order of the examples."""
        assert isinstance(self.sampler, BatchPlan)
        return self.sampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.position = self.plan.start
        batches = super().__iter__()
        self.plan.start = 0  # the next epoch starts at its beginning
        for batch in batches if self.num_workers else prefetch(batches, ahead=2):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and position, with the sizes that they depend on."""
        return {"epoch": self.plan.epoch, "position": self.position, **self._sizes()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iterator start at the position of the state.

        Raises:
            UserError: The sizes of the state, which a position depends on, differ.
        """
        for name, value in self._sizes().items():
            if state[name] != value:
                raise UserError(
                    f"{name} is {value}, but the run to resume has {state[name]}, which its "
                    f"position among the examples depends on: resume with {state[name]}, or start "
                    "a new run"
                )
        ended, position = divmod(state["position"], len(self.plan))
        self.plan.epoch, self.plan.start, self.position = state["epoch"] + ended, position, position

    def _sizes(self) -> dict[str, int]:
        """The sizes that a position depends on, by their keys in the recipe."""
        return {
            "the number of training examples": len(self.plan.lengths),
            "data.batch_size": self.plan.batching.batch_size,
            "trainer.accumulate": self.plan.batching.accumulate,
        }


def make_loader(
    split: Dataset,
    task: Task,
    pad_id: int,
    batching: Batching,
    workers: int = 0,
    teacher_pad_id: int | None = None,
) -> Loader:
    """Load batches of encoded examples; `zip(loader.plan, loader)` pairs them with their indices.

    Args:
        split: Encoded examples.
        task: Collates the examples.
        pad_id: Id of the padding token.
        batching: Sizes, order, and this process.
        workers: Worker processes that collate; 0 collates in a thread of this process.
        teacher_pad_id: Id of the padding token of a teacher with inputs of its own.
    """
    plan = BatchPlan(split, batching)
    if batching.seed is not None:
        log.info("%.1f %% of the tokens of an epoch are padding", 100 * plan.padding_share())
    return Loader(
        EncodedDataset(split, task, pad_id, teacher_pad_id, batching.multiple),
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        # Each iterator draws a seed; a separate generator leaves the global one unchanged.
        generator=torch.Generator().manual_seed(0),
        persistent_workers=workers > 0,
        pin_memory=batching.pinned,
    )


def _identity(batch: Any) -> Any:
    return batch
