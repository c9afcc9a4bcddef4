"""One run as several processes (ranks): who this one is, and what all of them must agree on.

In a single process everything here is a no-op. Python values travel as pickles between the processes of one run, which trust
each other; nothing of it is ever read from a file.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from distill.errors import RunFailed, UserError
from distill.recipe.config import Trainer

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # in which all ranks must have started
COLLECTIVE_TIMEOUT = timedelta(
    days=7
)  # ranks wait for the first while it downloads, measures and exports


def rank() -> int:
    """The number of this process, 0 for the first."""
    return distributed.get_rank() if _several() else 0


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if _several() else 1


def is_rank_zero() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def all_gather(value: T) -> list[T]:
    """Each rank's value, in the order of the ranks, on all of them."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(found, value)
    return found


def broadcast(value: T) -> T:
    """The first rank's value, on all of them."""
    held: list[Any] = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(held, src=0)
    return held[0]


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """What it returns on the first rank, which alone calls it, on all of them."""
    return broadcast(function() if is_rank_zero() else None)  # type: ignore[return-value]


def barrier() -> None:
    """Returns when all ranks have come here."""
    all_gather(None)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, on all of them."""
    if world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value


def all_reduce_sum_by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks by name, where these compute; a rank that lacks a name adds nothing to it."""
    if world_size() == 1:
        return dict(values)
    device = "cuda" if "nccl" in distributed.get_backend_config() else "cpu"
    known = all_gather({name: (value.shape, value.dtype) for name, value in values.items()})
    forms = sorted({name: form for each in known for name, form in each.items()}.items())
    summed: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(
        dtype for _, (_, dtype) in forms
    ):  # what has one type travels together
        shapes = {name: shape for name, (shape, its) in forms if its == dtype}
        own = [
            values[name].flatten() if name in values else torch.zeros(shape.numel(), dtype=dtype)
            for name, shape in shapes.items()
        ]
        parts = all_reduce_sum(
            torch.cat([restore_partial_sums.to(device) for restore_partial_sums in own])
        ).split([shape.numel() for shape in shapes.values()])
        summed |= {
            name: restore_partial_sums.view(shape).clone()
            for (name, shape), restore_partial_sums in zip(shapes.items(), parts, strict=True)
        }
    return summed


def restore_partial_sums(saved: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What this rank adds to sums that each rank had saved: its own or, where there are more or fewer ranks now, all or nothing."""
    if len(saved) == world_size():
        return saved[rank()]
    together: dict[str, Tensor] = {}
    for values in saved if is_rank_zero() else []:
        together |= {
            name: together[name] + value if name in together else value
            for name, value in values.items()
        }
    return together


def all_reduce_max(values: list[int]) -> list[int]:
    """The highest of each value over all ranks, on all of them."""
    if world_size() == 1:
        return values
    found = torch.tensor(values)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """The first rank does it while the others wait, who then do it themselves: what it fetched or stored is there for them.

    Where it fails for the first, the others end without a word: the first has the sentence.
    """
    if not is_rank_zero() and not broadcast(False):
        sys.exit(1)
    try:
        yield
    except BaseException:
        _tell(False)
        raise
    _tell(True)


def _tell(done: bool) -> None:
    if is_rank_zero():
        broadcast(done)


# ---- start and end


def join_process_group(settings: Trainer) -> None:
    """Join the other ranks, where `distill.processes.launch`, torchrun or srun has started several; those after the first fall silent."""
    _read_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    here = int(os.environ["LOCAL_RANK"])
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    _join("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if not is_rank_zero():
        _fall_silent()
    if on_gpu:
        short = [
            count
            for index, count in all_gather((here, torch.cuda.device_count()))
            if index >= count
        ]
        if short:  # all ranks say so, and none waits for another
            raise UserError(
                f"trainer.devices is {os.environ['LOCAL_WORLD_SIZE']}, but a machine has {short[0]} GPUs: "
                "start one process per GPU, or set trainer.accelerator=cpu"
            )
        torch.cuda.set_device(here)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
        )


def _join(backend: str) -> None:
    """Meet the other ranks; RunFailed where some do not come."""
    try:
        store, number, count = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        distributed.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=COLLECTIVE_TIMEOUT
        )
    except RuntimeError as error:
        minutes = RENDEZVOUS_TIMEOUT.total_seconds() / 60
        raise RunFailed(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not as many processes met within {minutes:g} minutes "
            f"({str(error).splitlines()[0]}): start all of them, with one MASTER_ADDR and MASTER_PORT"
        ) from error


def leave_process_group() -> None:
    """Leave the other ranks."""
    if _several():
        distributed.destroy_process_group()


def _read_slurm() -> None:
    """What srun tells its processes, in the words of torchrun; a batch script outside srun is a process like any other."""
    given = os.environ
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    world_size, nodes = (
        int(given["SLURM_STEP_NUM_TASKS"]),
        int(given.get("SLURM_STEP_NUM_NODES", 1)),
    )
    if world_size % nodes:
        raise UserError(
            f"srun has {world_size} tasks on {nodes} nodes, but every node needs as many: use --ntasks-per-node"
        )
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", given["SLURM_STEP_NODELIST"]).split(",")[
        0
    ]  # node[07-09,12] -> node07
    port = 20000 + int(given["SLURM_JOB_ID"]) % 20000  # another for each job of a machine
    os.environ |= {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": given["SLURM_LOCALID"],
    }
    os.environ |= {
        "LOCAL_WORLD_SIZE": str(world_size // nodes),
        "GROUP_RANK": given.get("SLURM_NODEID", "0"),
    }
    os.environ |= {"MASTER_ADDR": first, "MASTER_PORT": str(port)}


def _fall_silent() -> None:
    """Nothing on stdout, no log file, and of the log on stderr errors alone."""
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
        handler.setLevel(logging.ERROR)
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


# ---- Lightning


def lightning_strategy(settings: Trainer) -> dict[str, Any]:
    """What a Lightning Trainer must be told of the processes that there are: accelerator, devices, num_nodes and strategy."""
    if world_size() == 1:
        return {"accelerator": settings.accelerator, "devices": 1}
    warnings.filterwarnings(
        "ignore", ".*sync_dist=True.*"
    )  # what is logged is a sum over the ranks, or the same on all of them
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    newer = (
        "forward_sync_buffers" in signature(nn.parallel.DistributedDataParallel).parameters
    )  # torch 2.13 has renamed it
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if newer else "broadcast_buffers": False
    }  # they are constants
    replicas = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),  # reads RANK and its like, and starts nothing
        **buffers,
        find_unused_parameters=True,  # a model may have parts that its task does not use, a pooler say
    )
    return {
        "accelerator": settings.accelerator,
        "devices": here,
        "num_nodes": world_size() // here,
        "strategy": replicas,
    }
