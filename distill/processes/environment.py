"""The processes of a run, from the environment variables of torchrun, srun and the launcher.

It does not import torch, so that a command with bad input fails fast.
"""

import os
import re

from distill.errors import UserError
from distill.recipe.config import Trainer

__all__ = ["check_variables", "processes_to_start", "read_slurm"]

# What torchrun sets, besides RANK, for each of several processes.
_OF_A_RANK = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What srun sets for each of several tasks.
_OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
_START = "start all processes with torchrun or srun"


def check_variables() -> None:
    """Check the variables of launchers: all that a process needs are there, and they agree.

    Raises:
        UserError: if one is missing, is no number, or contradicts another.
    """
    size, tasks = _integer("WORLD_SIZE", 1, 1), _slurm_tasks()
    if "RANK" not in os.environ and tasks > 1:
        for name in _OF_A_TASK:
            _require(name, f"SLURM_STEP_NUM_TASKS is {tasks}")
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES"):
            _integer(name, 1)
        return
    if "RANK" not in os.environ:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            if _integer(name, 0) > (name == "WORLD_SIZE"):
                raise UserError(
                    f"{name} is {os.environ[name]}, but RANK is not set: {_START}, or unset {name}"
                )
        return
    rank = _integer("RANK", 0)
    if rank:
        _require("WORLD_SIZE", f"RANK is {rank}")
    if size > 1:
        for name in _OF_A_RANK:
            _require(name, f"RANK is {rank}")
        _integer("MASTER_PORT", 0, 1, 65535)
        local_size = _integer("LOCAL_WORLD_SIZE", 1, 1, size)
        _integer("LOCAL_RANK", 0, 0, local_size - 1)
    _integer("RANK", 0, 0, size - 1)


def _require(name: str, reason: str) -> None:
    if not os.environ.get(name):
        raise UserError(f"{reason}, but {name} is not set: {_START}, or unset the variables of it")


def _integer(name: str, default: int, low: int = 0, high: int | None = None) -> int:
    """An environment variable as a number; UserError if it is none, or beyond its limits."""
    text = os.environ.get(name)
    if not text:
        return default
    value = int(text) if text.isascii() and text.isdecimal() else None
    if value is None or value < low or (high is not None and value > high):
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UserError(
            f"{name} is {text}, but it must be an integer {limits} here: {_START}, or unset it"
        )
    return value


def processes_to_start(trainer: Trainer) -> int:
    """The number of processes to start on this machine.

    0 if torchrun or srun has started them, or if this process is enough.

    Raises:
        UserError: if the run needs several machines, or a launcher's variables are wrong.
    """
    check_variables()
    if "RANK" in os.environ or _slurm_tasks() > 1 or trainer.devices * trainer.nodes == 1:
        return 0
    if trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes is {trainer.nodes}, but this command starts processes on one machine "
            "only: use torchrun or srun"
        )
    return trainer.devices


def read_slurm() -> None:
    """Set the variables of torchrun from those of srun; a batch script outside srun has none.

    Raises:
        UserError: if the nodes have different numbers of tasks.
    """
    variables, world_size = os.environ, _slurm_tasks()
    if "RANK" in variables or world_size == 1:
        return
    nodes = _integer("SLURM_STEP_NUM_NODES", 1, 1)
    if world_size % nodes:
        raise UserError(
            f"srun has {world_size} tasks on {nodes} nodes, but every node needs the same number: "
            "use --ntasks-per-node"
        )
    nodelist = re.sub(r"\[(\d+)[^\]]*\]", r"\1", variables["SLURM_STEP_NODELIST"])
    variables |= {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(world_size // nodes),
        "GROUP_RANK": variables.get("SLURM_NODEID", "0"),
        "MASTER_ADDR": nodelist.split(",")[0],  # node[07-09,12] -> node07
        # jobs that share a machine need different ports
        "MASTER_PORT": str(20000 + int(variables["SLURM_JOB_ID"]) % 20000),
    }


def _slurm_tasks() -> int:
    return _integer("SLURM_STEP_NUM_TASKS", 1, 1)
