"""Micro-batches -> batches of tensors, in the order of a plan and from any position in it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torch.utils import data as torch_data

from distill.data import teacher_columns, token_spans
from distill.data.batches import Batching, BatchPlan, MicroBatch
from distill.data.prefetch import prefetch
from distill.errors import UserError
from distill.tasks.base import Task
from distill.tasks.batch import Batch, CachedHidden, FewTokens
from distill.tasks.collation import pack

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


@dataclass(frozen=True)
class Collator:
    """Turns encoded examples into a batch, padded or packed.

    Args:
        task: Collates the examples.
        pad_id: Id of the padding token.
        multiple: Lengths are rounded up to a multiple of it, at most to the task's longest.
        packing: Whether examples follow each other without padding.
    """

    task: Task
    pad_id: int
    multiple: int | None = None
    packing: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """The batch of these examples."""
        batch = self.task.collate(examples, self.pad_id)
        batch = batch._replace(spans=token_spans.collate(examples))
        if self.packing:
            return pack(batch)
        if self.multiple is not None:
            batch = self._lengthen(batch, self.multiple)
        return batch._replace(padded=not batch.inputs["attention_mask"].numpy().all())

    def _lengthen(self, batch: Batch, multiple: int) -> Batch:
        """Add padding up to a multiple."""
        length = batch.inputs["input_ids"].shape[1]
        target = max(length, min(-(-length // multiple) * multiple, self.task.max_length))
        inputs = {
            name: functional.pad(
                column, (0, target - length), value=self.pad_id if name == "input_ids" else 0
            )
            for name, column in batch.inputs.items()
        }
        positions = batch.positions
        if positions is not None:
            positions = positions // length * target + positions % length
        return batch._replace(inputs=inputs, positions=positions)


class EncodedDataset(torch_data.Dataset[Batch]):
    """Maps a micro-batch to a batch, with normalizers and cached outputs of the teacher.

    Args:
        split: Encoded examples, possibly with columns for the teacher.
        collate: Makes batches.
        teacher_pad_id: Id of the padding token of a teacher with inputs of its own.
    """

    def __init__(
        self, split: Dataset, collate: Collator, teacher_pad_id: int | None = None
    ) -> None:
        self.collate, self.teacher_collate = collate, None
        if teacher_pad_id is not None:
            self.teacher_collate = replace(collate, pad_id=teacher_pad_id)
        cached = [name for name in split.column_names if name in teacher_columns.COLUMNS]
        self.teacher = split.select_columns(cached).with_format("arrow") if cached else None
        self.split = split.remove_columns(cached).with_format("arrow")

    def __getitem__(self, micro: MicroBatch) -> Batch:
        columns, inputs = teacher_columns.split_inputs(_columns(self.split[micro.indices]))
        batch = self.collate(columns_to_examples(columns))
        if inputs and self.teacher_collate is not None:
            batch = batch._replace(teacher_batch=self.teacher_collate(columns_to_examples(inputs)))
        return batch._replace(
            teacher=self._teacher_outputs(micro.indices),
            rows=float(micro.rows),
            tokens=float(micro.tokens),
        )

    def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Encoded examples, as `Task.collate` takes them."""
        columns, _ = teacher_columns.split_inputs(_columns(self.split[list(indices)]))
        return columns_to_examples(columns)

    def _teacher_outputs(self, indices: list[int]) -> Tensor | CachedHidden | FewTokens | None:
        return None if self.teacher is None else teacher_columns.read_outputs(self.teacher[indices])


# The number of the first optimizer step, and the batches from there on -> those to train on.
Rewrite = Callable[[int, Iterator[tuple[MicroBatch, Batch]]], Iterator[Batch]]


class Loader(torch_data.DataLoader[Batch]):
    """A DataLoader whose state is the position in an epoch, the same on all ranks.

    A run resumes from there with any number of ranks. Batches that worker processes, or else a
    thread, have prefetched do not count.
    """

    position = 0  # micro-batches of the epoch that have been yielded
    rewrite: Rewrite | None = None  # replaces batches when they are due, in the training process

    @property
    def plan(self) -> BatchPlan:
        """The order of the examples."""
        assert isinstance(self.sampler, BatchPlan)
        return self.sampler

    def first_batch(self) -> Batch:
        """A batch of the first example."""
        micro = next(iter(self.plan))
        batch: Batch = self.dataset[micro._replace(indices=micro.indices[:1])]
        return batch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.position = self.plan.start
        step = self.plan.epoch * self.plan.steps + self.position // self.plan.batching.accumulate
        micro_batches = () if self.rewrite is None else iter(self.plan)
        batches: Iterator[Batch] = super().__iter__()
        self.plan.start = 0  # the next epoch starts at its beginning
        if not self.num_workers:
            batches = prefetch(batches, ahead=2)
        if self.rewrite is not None:
            batches = self.rewrite(step, zip(micro_batches, batches, strict=True))
        for batch in batches:
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
        verb = "would be padding: packing leaves them out" if batching.packing else "are padding"
        log.info("%.1f %% of the tokens of an epoch %s", 100 * plan.padding_share(), verb)
    collate = Collator(task, pad_id, batching.multiple, batching.packing)
    return Loader(
        EncodedDataset(split, collate, teacher_pad_id),
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
