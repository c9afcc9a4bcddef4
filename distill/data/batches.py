"""Encoded examples -> micro-batches, in an order that is a function of (seed, epoch) and of nothing else."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils import data as torch_data

from distill.errors import UserError
from distill.tasks.base import Batch, Task

log = logging.getLogger(__name__)

CHUNK = 50  # global batches whose examples are sorted by length together
CACHED = "teacher_logits"  # a column of lists of rows


class MicroBatch(NamedTuple):
    """A part of a global batch. `rows` and `tokens` are the whole global batch's: what its loss is divided by."""

    indices: list[int]
    rows: int
    tokens: int


class BatchPlan(torch_data.Sampler[MicroBatch]):
    """Hands out every example once per epoch.

    A global batch is what one optimizer step learns from, whatever the number of micro-batches that it is cut into. With
    `group_by_length`, its examples are of similar length, longest first. The examples left over after the last full global batch
    come last, in fewer micro-batches where they are fewer than `accumulate`. Without a seed the order is the examples' own or,
    grouped by length, from the longest to the shortest.
    """

    def __init__(self, split: Dataset, batch_size: int, accumulate: int = 1, seed: int | None = None, group_by_length: bool = True) -> None:
        if accumulate > batch_size:
            raise UserError(
                f"trainer.accumulate is {accumulate}, but data.batch_size is {batch_size}: a micro-batch needs an example, so lower it"
            )
        columns = split.with_format("numpy")
        self.lengths, self.rows = np.asarray(columns["length"][:]), np.asarray(columns["rows"][:])
        self.batch_size, self.accumulate, self.seed, self.group_by_length = batch_size, accumulate, seed, group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self.accumulate + min(self.accumulate, rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self.global_batches():
            rows, tokens = int(self.rows[batch].sum()), int(self.lengths[batch].sum())
            for part in np.array_split(batch, min(self.accumulate, len(batch))):
                yield MicroBatch(part.tolist(), rows, tokens)

    def global_batches(self) -> list[np.ndarray]:
        """The examples of each optimizer step of this epoch."""
        if self.seed is None:
            order = self._sorted(np.arange(len(self.lengths)))
            return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        full, size = len(order) // self.batch_size, self.batch_size
        chunks = [self._sorted(order[start : min(start + CHUNK * size, full * size)]) for start in range(0, full * size, CHUNK * size)]
        batches: Any = np.concatenate(chunks).reshape(full, size)[generator.permutation(full)] if chunks else []
        rest = order[full * size :]
        return [*batches, *([self._sorted(rest)] if len(rest) else [])]

    def padding(self) -> float:
        """The share of padding among the tokens of this epoch."""
        padded = sum(int(self.lengths[micro.indices].max()) * len(micro.indices) for micro in self)
        return 1 - int(self.lengths.sum()) / padded

    def _sorted(self, examples: np.ndarray) -> np.ndarray:
        return examples[np.argsort(-self.lengths[examples], kind="stable")] if self.group_by_length else examples


class Examples(torch_data.Dataset[Batch]):
    """Collates the examples of a micro-batch, and carries its normalisers and the teacher's cached outputs along."""

    def __init__(self, split: Dataset, task: Task, pad_id: int) -> None:
        self.task, self.pad_id, self.teacher = task, pad_id, None
        if CACHED in split.column_names:
            self.teacher = split.select_columns([CACHED]).with_format("arrow")
            split = split.remove_columns([CACHED])
        self.split = split.with_format(None)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        columns: dict[str, list[Any]] = self.split[micro.indices]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = self.task.collate(examples, self.pad_id)
        return batch._replace(teacher=self._teacher_rows(micro.indices), rows=float(micro.rows), tokens=float(micro.tokens))

    def _teacher_rows(self, indices: list[int]) -> torch.Tensor | None:
        """Cached logits of all rows, example by example, (N, C): straight from the file's buffers, for they may be many."""
        if self.teacher is None:
            return None
        rows = [chunk.flatten() for chunk in self.teacher[indices][CACHED].chunks]
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in rows])
        return torch.from_numpy(values.reshape(sum(map(len, rows)), -1))


class Loader(torch_data.DataLoader[Batch]):
    """Micro-batches in the order of a plan."""

    @property
    def plan(self) -> BatchPlan:
        assert isinstance(self.sampler, BatchPlan)
        return self.sampler


def loader(
    split: Dataset,
    task: Task,
    pad_id: int,
    batch_size: int,
    accumulate: int = 1,
    seed: int | None = None,
    group_by_length: bool = True,
    workers: int = 0,
) -> Loader:
    """Micro-batches of encoded examples. `zip(loader.plan, loader)` tells which examples it holds."""
    plan = BatchPlan(split, batch_size, accumulate, seed, group_by_length)
    if seed is not None:
        log.info("%.1f %% of the tokens of an epoch are padding", 100 * plan.padding())
    return Loader(
        Examples(split, task, pad_id),
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator().manual_seed(0),  # its own: to start an epoch leaves the global one where it is
        persistent_workers=workers > 0,
    )


def _as_is(batch: Any) -> Any:
    return batch
