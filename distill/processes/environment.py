"""The processes of a run, from the environment variables of torchrun, srun and the launcher.

It does not import torch, so that a command with bad input fails fast.
"""

import os
import re

from distill.errors import UserError
from distill.recipe.config import Trainer

__all__ = ["processes_to_start", "read_slurm"]


def processes_to_start(trainer: Trainer) -> int:
    """The number of processes to start on this machine.

    0 if torchrun or srun has started them, or if this process is enough.

    Raises:
        UserError: if the run needs several machines.
    """
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
    nodes = int(variables.get("SLURM_STEP_NUM_NODES", 1))
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
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
