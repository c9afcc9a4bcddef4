"""The rank of this process, and collectives over Python values and tensors.

In a single process everything here returns its argument. Values are pickled between the processes
of one run only; no pickle is read from a file.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = [
    "all_gather",
    "all_reduce_max",
    "all_reduce_sum",
    "all_reduce_sum_by_name",
    "barrier",
    "broadcast",
    "in_process_group",
    "is_rank_zero",
    "rank",
    "rank_zero_first",
    "restore_partial_sums",
    "run_on_rank_zero",
    "single_process",
    "world_size",
]

T = TypeVar("T")

_is_single = False  # see `single_process`


def rank() -> int:
    """The rank of this process, 0 in a single process."""
    return distributed.get_rank() if in_process_group() else 0


def world_size() -> int:
    """The number of processes, 1 in a single process."""
    return distributed.get_world_size() if in_process_group() else 1


def is_rank_zero() -> bool:
    """Whether this is the process that prints, logs and writes files."""
    return rank() == 0


def in_process_group() -> bool:
    """Whether this process has joined a process group."""
    return distributed.is_available() and distributed.is_initialized() and not _is_single


@contextmanager
def single_process() -> Iterator[None]:
    """Inside the block, this process is alone: for code that only one rank runs.

    A collective in it would be taken for the next one of the other ranks.
    """
    global _is_single
    before, _is_single = _is_single, True
    try:
        yield
    finally:
        _is_single = before


def all_gather(value: T) -> list[T]:
    """Gather a value of every rank on all ranks.

    Args:
        value: Anything that can be pickled.

    Returns:
        The values in the order of the ranks.
    """
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return the value of rank zero on all ranks.

    Args:
        value: Anything that can be pickled; ignored on the other ranks.
    """
    values: list[Any] = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function on rank zero and return its result on all ranks.

    Example::

        newest = run_on_rank_zero(lambda: newest_checkpoint(folder))
    """
    return broadcast(function() if is_rank_zero() else None)  # type: ignore[return-value]


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_gather(None)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks.

    Args:
        value: Of the same shape and dtype on all ranks, on a device that the backend supports.

    Returns:
        The sum, as a new tensor; `value` itself in a single process.
    """
    if world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value


def all_reduce_sum_by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum tensors over all ranks by name, with one all-reduce per dtype.

    Args:
        values: Of the same shape and dtype on all ranks that have the name; other ranks add 0.

    Returns:
        The sums by name, on all ranks: on the GPU with NCCL, else on the CPU.
    """
    if world_size() == 1:
        return dict(values)
    device = "cuda" if "nccl" in distributed.get_backend_config() else "cpu"
    gathered = all_gather({name: (value.shape, value.dtype) for name, value in values.items()})
    specs = sorted({name: spec for by_name in gathered for name, spec in by_name.items()}.items())
    sums: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(dtype for _, (_, dtype) in specs):
        shapes = {name: shape for name, (shape, other) in specs if other == dtype}
        parts = [
            values[name].flatten() if name in values else torch.zeros(shape.numel(), dtype=dtype)
            for name, shape in shapes.items()
        ]
        total = all_reduce_sum(torch.cat([part.to(device) for part in parts]))
        sizes = [shape.numel() for shape in shapes.values()]
        for (name, shape), part in zip(shapes.items(), total.split(sizes), strict=True):
            sums[name] = part.view(shape).clone()
    return sums


def restore_partial_sums(saved: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The part of saved sums that this rank continues with; the total does not change.

    Args:
        saved: The sums by name of each rank that saved.

    Returns:
        The rank's saved sums if the number of ranks is the same. Otherwise rank zero gets the total
        and the others get nothing.
    """
    if len(saved) == world_size():
        return saved[rank()]
    return _add_by_name(saved) if is_rank_zero() else {}


def _add_by_name(summands: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for values in summands:
        for name, value in values.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def all_reduce_max(values: list[int]) -> list[int]:
    """The elementwise maximum over all ranks, on all ranks.

    Args:
        values: Of the same length on all ranks.
    """
    if world_size() == 1:
        return values
    maxima = torch.tensor(values)
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
    return maxima.tolist()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank zero, then on the other ranks, which find the files that it wrote.

    If the block raises on rank zero, the other ranks exit silently: rank zero reports the error.

    Example::

        with rank_zero_first():
            examples = load_and_cache(path)
    """
    if not is_rank_zero() and not broadcast(False):
        sys.exit(1)
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if is_rank_zero():
            broadcast(succeeded)
