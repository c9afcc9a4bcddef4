"""The Lightning strategy of a run."""

import os
from typing import Any

from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from distill import internals
from distill.processes import ranks
from distill.processes.fsdp import ShardedStrategy, uses_fsdp
from distill.recipe.config import Trainer

__all__ = ["lightning_strategy"]


def lightning_strategy(trainer: Trainer) -> dict[str, Any]:
    """The arguments of `lightning.Trainer` that describe the processes of this run.

    Returns:
        accelerator, devices and, for several processes, num_nodes and strategy.
    """
    if ranks.world_size() == 1:
        return {"accelerator": trainer.accelerator, "devices": 1}
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    return {
        "accelerator": trainer.accelerator,
        "devices": local_world_size,
        "num_nodes": ranks.world_size() // local_world_size,
        "strategy": ShardedStrategy() if uses_fsdp(trainer) else _ddp(),
    }


def _ddp() -> DDPStrategy:
    buffers: dict[str, Any] = internals.constant_buffers()  # buffers never change in training
    return DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),  # reads RANK and WORLD_SIZE, starts nothing
        find_unused_parameters=True,  # a task may not use all of a model, a pooler for example
        **buffers,
    )
