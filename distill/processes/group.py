"""Joining and leaving the process group of a run."""

import logging
import os
import sys
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from distill.errors import RunFailed, UserError
from distill.processes import ranks
from distill.processes.environment import read_slurm
from distill.recipe.config import Trainer

__all__ = ["join_process_group", "leave_process_group"]

_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # within which all ranks must start
# the other ranks wait while rank zero downloads, measures and exports
_COLLECTIVE_TIMEOUT = timedelta(days=7)


def join_process_group(trainer: Trainer) -> None:
    """Join the other ranks, if this process is one of several.

    Ranks other than zero stop printing and writing logs. On GPUs, a rank uses the device whose
    index is its local rank.

    Raises:
        UserError: if a machine has fewer GPUs than processes.
        RunFailed: if not all ranks join within ten minutes.
    """
    read_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    _init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if not ranks.is_rank_zero():
        _silence()
    if on_gpu:
        _set_cuda_device()
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def leave_process_group() -> None:
    """Destroy the process group, if there is one."""
    if ranks.in_process_group():
        distributed.destroy_process_group()


def _init_process_group(backend: str) -> None:
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
        )
    except RuntimeError as error:
        minutes = _RENDEZVOUS_TIMEOUT.total_seconds() / 60
        raise RunFailed(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but fewer processes joined within "
            f"{minutes:g} minutes ({str(error).splitlines()[0]}): start all of them, with one "
            "MASTER_ADDR and MASTER_PORT"
        ) from error


def _set_cuda_device() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    counts = ranks.all_gather((local_rank, torch.cuda.device_count()))
    too_few = [count for index, count in counts if index >= count]
    if too_few:  # raised by all ranks, so that none waits for another
        raise UserError(
            f"trainer.devices is {os.environ['LOCAL_WORLD_SIZE']}, but a machine has "
            f"{too_few[0]} GPUs: start one process per GPU, or set trainer.accelerator=cpu"
        )
    torch.cuda.set_device(local_rank)


def _silence() -> None:
    """Print nothing on stdout, write no log file, and print only errors on stderr."""
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
        handler.setLevel(logging.ERROR)
    sys.stdout.flush()
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)
