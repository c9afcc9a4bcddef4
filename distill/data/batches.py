"""Encoded examples -> micro-batches, in an order that is a function of (seed, epoch) and of nothing else.

Several processes (`world`, of which each has a `rank`) share every micro-batch of training; none sees an example of another's.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils import data as torch_data

from distill.data import teacher_columns
from distill.errors import UserError
from distill.tasks.base import Batch, Task

log = logging.getLogger(__name__)

CHUNK = 50  # global batches whose examples are sorted by length together


class MicroBatch(NamedTuple):
    """A part of a global batch. `rows` and `tokens` are the whole global batch's: what its loss is divided by."""

    indices: list[int]
    rows: float
    tokens: float


def is_dummy_batch(batch: MicroBatch | Batch) -> bool:
    """Whether it only keeps a rank in step: one example, divided by infinity, adds exactly 0 to losses and gradients."""
    return math.isinf(batch.rows)


class BatchPlan(torch_data.Sampler[MicroBatch]):
    """Hands out every example once per epoch, over all ranks.

    A global batch is what one optimizer step learns from, whatever the number of micro-batches and ranks that it is cut into.
    With `group_by_length`, its examples are of similar length, longest first. The examples left over after the last full global
    batch come last, in fewer micro-batches where they are fewer than `accumulate`.

    With a seed, a rank takes every world-th example of each micro-batch. Without one the order is the examples' own or, grouped
    by length, from the longest to the shortest, and a rank takes every world-th batch. A rank that is left without an example
    gets an idle micro-batch, for all to take the same number of steps.
    """

    def __init__(
        self,
        split: Dataset,
        batch_size: int,
        accumulate: int = 1,
        seed: int | None = None,
        group_by_length: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert accumulate <= batch_size
        columns = split.with_format("numpy")
        self.lengths, self.rows = np.asarray(columns["length"][:]), np.asarray(columns["rows"][:])
        self.batch_size, self.accumulate, self.seed, self.group_by_length = (
            batch_size,
            accumulate,
            seed,
            group_by_length,
        )
        self.rank, self.world = rank, world
        self.epoch, self.start = (
            0,
            0,
        )  # `start`: micro-batches of the epoch that are left out, for a run had them before

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        """Micro-batches of each rank in a whole epoch."""
        if self.seed is None:
            return -(-self.steps // self.world)
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self.accumulate + min(self.accumulate, rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        """What `epoch` and `start` say now is what the iterator gives, whatever becomes of them afterwards."""
        return islice(self._share(self.global_batches(), self.rank), self.start, None)

    def _share(self, batches: list[np.ndarray], rank: int) -> Iterator[MicroBatch]:
        """The micro-batches of one rank."""
        if self.seed is None:
            yield from (
                MicroBatch(batch.tolist(), *self._totals(batch))
                for batch in batches[rank :: self.world]
            )
            yield from repeat(self._idle(), int(rank >= (len(batches) % self.world or self.world)))
            return
        for batch in batches:
            totals = self._totals(batch)
            for part in np.array_split(batch, min(self.accumulate, len(batch))):
                mine = part[rank :: self.world]
                yield MicroBatch(mine.tolist(), *totals) if len(mine) else self._idle()

    def _totals(self, batch: np.ndarray) -> tuple[int, int]:
        """Rows and tokens of a global batch."""
        return int(self.rows[batch].sum()), int(self.lengths[batch].sum())

    def _idle(self) -> MicroBatch:
        return MicroBatch([int(self.lengths.argmin())], math.inf, math.inf)

    def global_batches(self) -> list[np.ndarray]:
        """The examples of each optimizer step of this epoch."""
        if self.seed is None:
            order = self._sorted(np.arange(len(self.lengths)))
            return [
                order[start : start + self.batch_size]
                for start in range(0, len(order), self.batch_size)
            ]
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        full, size = len(order) // self.batch_size, self.batch_size
        chunks = [
            self._sorted(order[start : min(start + CHUNK * size, full * size)])
            for start in range(0, full * size, CHUNK * size)
        ]
        batches: Any = (
            np.concatenate(chunks).reshape(full, size)[generator.permutation(full)]
            if chunks
            else []
        )
        rest = order[full * size :]
        return [*batches, *([self._sorted(rest)] if len(rest) else [])]

    def padding(self) -> float:
        """The share of padding among the tokens of this epoch, over all ranks."""
        batches = self.global_batches()
        shares = (
            micro
            for rank in range(self.world)
            for micro in self._share(batches, rank)
            if not is_dummy_batch(micro)
        )
        padded = sum(
            int(self.lengths[micro.indices].max()) * len(micro.indices) for micro in shares
        )
        return 1 - int(self.lengths.sum()) / padded

    def _sorted(self, examples: np.ndarray) -> np.ndarray:
        return (
            examples[np.argsort(-self.lengths[examples], kind="stable")]
            if self.group_by_length
            else examples
        )


def columns_to_examples(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns, as `Task.encode` returns them -> examples, as `Task.collate` takes them."""
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


class EncodedDataset(torch_data.Dataset[Batch]):
    """Collates the examples of a micro-batch, and carries its normalisers and the teacher's cached outputs along."""

    def __init__(self, split: Dataset, task: Task, pad_id: int) -> None:
        self.task, self.pad_id, self.teacher = task, pad_id, None
        cached = [name for name in split.column_names if name in teacher_columns.COLUMNS]
        if cached:
            self.teacher = split.select_columns(cached).with_format("arrow")
            split = split.remove_columns(cached)
        self.split = split.with_format(None)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        batch = self.task.collate(columns_to_examples(self.split[micro.indices]), self.pad_id)
        cached = (
            None
            if self.teacher is None
            else teacher_columns.read_outputs(self.teacher[micro.indices])
        )
        return batch._replace(teacher=cached, rows=float(micro.rows), tokens=float(micro.tokens))


class Loader(torch_data.DataLoader[Batch]):
    """Micro-batches in the order of a plan, from any place in an epoch.

    Its state says how much of which epoch was handed out, to all ranks alike: a run goes on from there with any number of them.
    Batches that workers have made in advance do not count.
    """

    position = 0  # micro-batches of the epoch that were handed out

    @property
    def plan(self) -> BatchPlan:
        assert isinstance(self.sampler, BatchPlan)
        return self.sampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.position = self.plan.start
        batches = super().__iter__()
        self.plan.start = 0  # of the next epoch; this one's iterators have theirs
        for batch in batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.plan.epoch, "position": self.position, **self._cut()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iterator begins where that of the state had come to; UserError where the examples were cut up differently."""
        for name, value in self._cut().items():
            if state[name] != value:
                raise UserError(
                    f"{name} is {value}, but the run to resume has {state[name]} and its place among the examples "
                    f"could not be found: resume with {name} as it was, or start a new run"
                )
        ended, position = divmod(state["position"], len(self.plan))
        self.plan.epoch, self.plan.start, self.position = state["epoch"] + ended, position, position

    def _cut(self) -> dict[str, int]:
        """What a position depends on, as the recipe calls it."""
        plan = self.plan
        return {
            "the number of training examples": len(plan.lengths),
            "data.batch_size": plan.batch_size,
            "trainer.accumulate": plan.accumulate,
        }


def make_loader(
    split: Dataset,
    task: Task,
    pad_id: int,
    batch_size: int,
    accumulate: int = 1,
    seed: int | None = None,
    group_by_length: bool = True,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Micro-batches of encoded examples. `zip(loader.plan, loader)` tells which examples it holds."""
    plan = BatchPlan(split, batch_size, accumulate, seed, group_by_length, rank, world)
    if seed is not None:
        log.info("%.1f %% of the tokens of an epoch are padding", 100 * plan.padding())
    return Loader(
        EncodedDataset(split, task, pad_id),
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator().manual_seed(
            0
        ),  # its own: to start an epoch leaves the global one where it is
        persistent_workers=workers > 0,
    )


def _as_is(batch: Any) -> Any:
    return batch
