"""The order of examples: micro-batches as a function of seed and epoch alone.

The examples are divided among `world` processes, each with a `rank`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch.utils import data as torch_data

from distill.tasks.batch import Batch

SORTED_TOGETHER = 50  # global batches whose examples are sorted by length together


@dataclass(frozen=True)
class Batching:
    """How examples are grouped into batches and shared between processes."""

    batch_size: int  # examples of a global batch: one optimizer step, over all ranks
    accumulate: int = 1  # micro-batches of a global batch
    seed: int | None = None  # shuffles the examples; None: dataset order, or sorted by length
    group_by_length: bool = True  # batches of similar lengths, which need little padding
    rank: int = 0  # rank of this process
    world: int = 1  # number of processes
    multiple: int | None = None  # padded lengths are rounded up to a multiple of it
    packing: bool = False  # examples follow each other without padding
    pinned: bool = False  # in pinned memory, from which a GPU copies while it computes


class MicroBatch(NamedTuple):
    """The part of a global batch that a rank processes at a time."""

    indices: list[int]  # indices of the examples
    rows: float  # rows of the global batch: the normalizer of the loss
    tokens: float  # tokens of the global batch: the normalizer of loss terms


def is_dummy_batch(batch: MicroBatch | Batch) -> bool:
    """Whether a batch only pads the number of batches of a rank to that of the others.

    It holds one example. Its normalizers are infinite, so that it adds exactly 0 to losses and
    gradients.
    """
    return math.isinf(batch.rows)


class BatchPlan(torch_data.Sampler[MicroBatch]):
    """A sampler of micro-batches: every example once per epoch, over all ranks.

    With `group_by_length`, the examples of a global batch have similar lengths, longest first. The
    remainder after the last full global batch comes last, in fewer micro-batches if it has fewer
    than `accumulate` examples.

    With a seed, a rank takes every world-th example of each micro-batch. Without one, examples come
    in dataset order or, grouped by length, longest first, and a rank takes every world-th batch. A
    rank without an example gets a dummy batch, so that all ranks take the same number of steps.

    Args:
        split: Encoded examples with columns `length` (tokens) and `rows`.
        batching: Sizes, order, and this process.
    """

    def __init__(self, split: Dataset, batching: Batching) -> None:
        assert batching.accumulate <= batching.batch_size
        columns = split.with_format("numpy")
        self.lengths, self.rows = np.asarray(columns["length"][:]), np.asarray(columns["rows"][:])
        self.batching = batching
        self.epoch = 0
        self.start = 0  # micro-batches to skip, which a resumed run has already trained on

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return -(-len(self.lengths) // self.batching.batch_size)

    def __len__(self) -> int:
        """Micro-batches of each rank in an epoch."""
        if self.batching.seed is None:
            return -(-self.steps // self.batching.world)
        full, rest = divmod(len(self.lengths), self.batching.batch_size)
        return full * self.batching.accumulate + min(self.batching.accumulate, rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        """The micro-batches of `epoch` from `start` on, both read when the iterator is created."""
        return islice(self._of_rank(self.global_batches(), self.batching.rank), self.start, None)

    def _of_rank(self, batches: list[np.ndarray], rank: int) -> Iterator[MicroBatch]:
        """The micro-batches of one rank."""
        world = self.batching.world
        if self.batching.seed is None:
            for batch in batches[rank::world]:
                yield MicroBatch(batch.tolist(), *self._totals(batch))
            yield from repeat(self._dummy(), int(rank >= (len(batches) % world or world)))
            return
        for batch in batches:
            totals = self._totals(batch)
            for part in np.array_split(batch, min(self.batching.accumulate, len(batch))):
                indices = part[rank::world]
                yield MicroBatch(indices.tolist(), *totals) if len(indices) else self._dummy()

    def _totals(self, batch: np.ndarray) -> tuple[int, int]:
        """Rows and tokens of a global batch."""
        return int(self.rows[batch].sum()), int(self.lengths[batch].sum())

    def _dummy(self) -> MicroBatch:
        return MicroBatch([int(self.lengths.argmin())], math.inf, math.inf)

    def global_batches(self) -> list[np.ndarray]:
        """The examples of each optimizer step of this epoch."""
        size = self.batching.batch_size
        if self.batching.seed is None:
            order = self._sort(np.arange(len(self.lengths)))
            return [order[start : start + size] for start in range(0, len(order), size)]
        generator = np.random.default_rng([self.batching.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        full = len(order) // size
        chunks = [
            self._sort(order[start : min(start + SORTED_TOGETHER * size, full * size)])
            for start in range(0, full * size, SORTED_TOGETHER * size)
        ]
        batches: Any = []
        if chunks:
            batches = np.concatenate(chunks).reshape(full, size)[generator.permutation(full)]
        rest = order[full * size :]
        return [*batches, *([self._sort(rest)] if len(rest) else [])]

    def padding_share(self) -> float:
        """The share of padding among the tokens of this epoch, over all ranks."""
        batches = self.global_batches()
        padded = sum(
            int(self.lengths[micro.indices].max()) * len(micro.indices)
            for rank in range(self.batching.world)
            for micro in self._of_rank(batches, rank)
            if not is_dummy_batch(micro)
        )
        return 1 - int(self.lengths.sum()) / padded

    def _sort(self, examples: np.ndarray) -> np.ndarray:
        if not self.batching.group_by_length:
            return examples
        return examples[np.argsort(-self.lengths[examples], kind="stable")]
