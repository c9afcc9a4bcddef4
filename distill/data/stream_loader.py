"""A stream of rows -> batches of tensors, resumable at every optimizer step.

Each worker of each process is a lane of the stream, which makes every step of its process in turn.
Normalizers are summed over the processes when a step is fetched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils import data as torch_data

from distill.data.batches import Batching
from distill.data.columns import blank_cells, read_texts
from distill.data.loader import Collator, columns_to_examples
from distill.data.prefetch import prefetch
from distill.data.streams import Place, Stream
from distill.errors import UserError
from distill.processes import ranks
from distill.recipe.config import Data
from distill.tasks.base import Task
from distill.tasks.batch import Batch

CHUNK = 100  # rows that are tokenized at a time
_States = dict[int, list[int]]  # lane -> a place, and the encoded examples of its block before it


@dataclass(frozen=True)
class Encoder:
    """Turns raw rows into encoded examples."""

    task: Task
    tokenizer: Any
    data: Data

    def __call__(self, rows: Any) -> Iterator[dict[str, Any]]:
        """The examples of the rows of an Arrow table."""
        part, name = Dataset(rows), self.data.train
        texts = read_texts(part, name, self.data, self.task, streamed=True)
        texts = texts.select(np.flatnonzero(~blank_cells(texts).all(0)))
        for start in range(0, len(texts), CHUNK):
            columns = self.task.encode(texts[start : start + CHUNK], self.tokenizer, self.data)
            yield from columns_to_examples(columns)


class Step(NamedTuple):
    """What a lane contributes to an optimizer step."""

    batches: list[Batch]  # micro-batches of this process
    rows: float
    tokens: float
    lane: int
    state: list[int]  # of the lane after this step


class StreamPlan(NamedTuple):
    """How a stream is batched."""

    batching: Batching
    steps: int = 1 << 40  # optimizer steps of an epoch, which no training ends


class StreamDataset(torch_data.IterableDataset[Step]):
    """The optimizer steps of this process, or of one of its workers.

    Args:
        stream: The rows.
        encode: Makes examples of them.
        collate: Makes batches of examples.
        batching: Sizes, and this process.
    """

    def __init__(
        self, stream: Stream, encode: Encoder, collate: Collator, batching: Batching
    ) -> None:
        self.stream, self.encode, self.collate, self.batching = stream, encode, collate, batching
        self.states: _States = {}
        self.first = 0  # optimizer steps before the next iterator's
        self.workers = 1

    def __iter__(self) -> Iterator[Step]:
        worker = torch_data.get_worker_info()
        turn = (self.first + (0 if worker is None else worker.id)) % self.workers
        batching = self.batching
        lane, lanes = batching.rank * self.workers + turn, batching.world * self.workers
        size = len(range(batching.rank, batching.batch_size, batching.world))
        examples = self._examples(lane, lanes, self.states.get(lane, [*Place(), 0]))
        while step := list(islice(examples, size)):
            parts = np.array_split(np.arange(size), batching.accumulate)
            yield Step(
                [self.collate([step[index][0] for index in part]) for part in parts],
                float(sum(example["rows"] for example, _ in step)),
                float(sum(example["length"] for example, _ in step)),
                lane,
                step[-1][1],
            )

    def _examples(
        self, lane: int, lanes: int, state: list[int]
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """The examples of a lane after a state, each with the state after it."""
        done = state[-1]
        for place, rows in self.stream.blocks(lane, lanes, Place(*state[:-1])):
            for number, example in enumerate(self.encode(rows) if len(rows) else (), 1):
                if number > done:
                    yield example, [*place, number]
            done = 0


class StreamLoader:
    """The micro-batches of a stream; its state is the place of every lane of all processes."""

    def __init__(self, steps: StreamDataset, workers: int = 0) -> None:
        steps.workers = max(workers, 1)
        self.steps, self.workers = steps, workers
        self.plan = StreamPlan(steps.batching)
        self.position = 0  # micro-batches that have been yielded
        self._states: dict[int, _States] = {0: {}}  # optimizer steps -> the state after them

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.plan.steps * self.plan.batching.accumulate

    def first_batch(self) -> Batch:
        """The first micro-batch of the next step."""
        return next(iter(self.steps)).batches[0]

    def __iter__(self) -> Iterator[Batch]:
        accumulate = self.plan.batching.accumulate
        number = self.position // accumulate
        self.steps.first, self.steps.states = number, self._states[number]
        fetched = iter(
            torch_data.DataLoader(
                self.steps,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_identity,
                # Each iterator draws a seed; a separate generator leaves the global one unchanged.
                generator=torch.Generator().manual_seed(0),
                pin_memory=self.plan.batching.pinned,
            )
        )
        for step in fetched if self.workers else prefetch(fetched, ahead=2):
            states = self._states[number] | {step.lane: step.state}
            number += 1
            self._states = {number - 1: self._states[number - 1], number: states}
            rows, tokens = _summed(step.rows, step.tokens)
            for batch in step.batches:
                self.position += 1
                yield batch._replace(rows=rows, tokens=tokens)

    def state_dict(self) -> dict[str, Any]:
        """The place of every lane before and after the last optimizer step; a collective."""
        gathered = ranks.all_gather(self._states)
        steps = {
            number: {lane: state for each in gathered for lane, state in each[number].items()}
            for number in self._states
        }
        return {"position": self.position, "steps": steps, "sizes": self._sizes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iterator start where the state was saved.

        Raises:
            UserError: The sizes of the state, which its places depend on, differ.
        """
        for name, value in self._sizes().items():
            if state["sizes"][name] != value:
                raise UserError(
                    f"{name} is {value}, but the run to resume has {state['sizes'][name]}, which "
                    "its place in the stream depends on: resume with "
                    f"{state['sizes'][name]}, or start a new run"
                )
        self.position = state["position"]
        number = self.position // self.plan.batching.accumulate
        first = self.plan.batching.rank * self.steps.workers
        lanes = range(first, first + self.steps.workers)
        states = state["steps"][number]
        self._states = {number: {lane: states[lane] for lane in lanes if lane in states}}

    def _sizes(self) -> dict[str, int]:
        """The sizes that a place depends on, by their keys in the recipe."""
        batching = self.plan.batching
        return {
            "the number of shards": len(self.steps.stream.held_out),
            "data.batch_size": batching.batch_size,
            "trainer.accumulate": batching.accumulate,
            "the number of processes": batching.world,
            "data.workers": self.workers,
        }


def make_stream_loader(
    stream: Stream,
    encode: Encoder,
    pad_id: int,
    batching: Batching,
    workers: int = 0,
) -> StreamLoader:
    """Load the batches of a stream, without end.

    Args:
        stream: The rows.
        encode: Makes examples of them.
        pad_id: Id of the padding token.
        batching: Sizes, and this process.
        workers: Worker processes that read and collate; 0: a thread of this process.

    Raises:
        UserError: A micro-batch of a process would have no example.
    """
    least = batching.accumulate * batching.world
    if batching.batch_size < least:
        raise UserError(
            f"data.batch_size is {batching.batch_size}, but with data.streaming each of "
            f"{least} micro-batches of a step needs an example: raise it"
        )
    collate = Collator(encode.task, pad_id, batching.multiple, batching.packing)
    return StreamLoader(StreamDataset(stream, encode, collate, batching), workers)


def _summed(*values: float) -> tuple[float, ...]:
    """Sums over all processes."""
    return tuple(map(sum, zip(*ranks.all_gather(values), strict=True)))


def _identity(step: Any) -> Any:
    return step
