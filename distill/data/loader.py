"""Micro-batches -> batches of tensors, in the order of a plan and from any position in it."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils import data as torch_data

from distill.data import teacher_columns
from distill.data.batches import Batching, BatchPlan, MicroBatch
from distill.errors import UserError
from distill.tasks.base import Task
from distill.tasks.batch import Batch, CachedHidden, SparseTargets

log = logging.getLogger(__name__)


def columns_to_examples(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn columns, as `Task.encode` returns them, into examples, as `Task.collate` takes them."""
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


class EncodedDataset(torch_data.Dataset[Batch]):
    """Maps a micro-batch to a batch, with normalizers and cached outputs of the teacher.

    Args:
        split: Encoded examples, possibly with columns of teacher outputs.
        task: Collates the examples.
        pad_id: Id of the padding token.
    """

    def __init__(self, split: Dataset, task: Task, pad_id: int) -> None:
        self.task, self.pad_id = task, pad_id
        cached = [name for name in split.column_names if name in teacher_columns.COLUMNS]
        self.teacher = split.select_columns(cached).with_format("arrow") if cached else None
        self.split = split.remove_columns(cached).with_format(None)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        batch = self.task.collate(columns_to_examples(self.split[micro.indices]), self.pad_id)
        return batch._replace(
            teacher=self._teacher_outputs(micro.indices),
            rows=float(micro.rows),
            tokens=float(micro.tokens),
        )

    def _teacher_outputs(self, indices: list[int]) -> Tensor | CachedHidden | SparseTargets | None:
        return None if self.teacher is None else teacher_columns.read_outputs(self.teacher[indices])


class Loader(torch_data.DataLoader[Batch]):
    """A DataLoader whose state is the position in an epoch, the same on all ranks.

    A run resumes from there with any number of ranks. Batches that worker processes have prefetched
    do not count.
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
    split: Dataset, task: Task, pad_id: int, batching: Batching, workers: int = 0
) -> Loader:
    """Load batches of encoded examples; `zip(loader.plan, loader)` pairs them with their indices.

    Args:
        split: Encoded examples.
        task: Collates the examples.
        pad_id: Id of the padding token.
        batching: Sizes, order, and this process.
        workers: Worker processes that collate; 0 collates in this process.
    """
    plan = BatchPlan(split, batching)
    if batching.seed is not None:
        log.info("%.1f %% of the tokens of an epoch are padding", 100 * plan.padding_share())
    return Loader(
        EncodedDataset(split, task, pad_id),
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        # Each iterator draws a seed; a separate generator leaves the global one unchanged.
        generator=torch.Generator().manual_seed(0),
        persistent_workers=workers > 0,
    )


def _identity(batch: Any) -> Any:
    return batch
