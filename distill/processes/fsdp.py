"""`trainer.strategy=fsdp`: models that no device can hold, their parameters split over the processes and gathered block by block (FSDP2).

Checkpoints hold whole tensors under the names and numbers that they have without splitting: a run may go on with another strategy.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from distill.models import blocks
from distill.processes import ranks
from distill.recipe.config import Trainer


def uses_fsdp(settings: Trainer) -> bool:
    """Whether models are to be split: a single process has nobody to share with."""
    return settings.strategy == "fsdp" and ranks.world_size() > 1


def lightning_strategy(settings: Trainer) -> dict[str, Any]:
    """What :func:`distill.processes.ranks.strategy` tells a Lightning Trainer, with models split where the recipe says so."""
    told = ranks.lightning_strategy(settings)
    return told | {"strategy": ShardedStrategy()} if uses_fsdp(settings) else told


def device_mesh(device: str) -> DeviceMesh:
    """All processes in a row, on devices of this type."""
    return init_device_mesh(device, (ranks.world_size(),))


def shard(model: PreTrainedModel, device_mesh: DeviceMesh) -> PreTrainedModel:
    """A copy of which each process holds its share, on the mesh's device; all of them must call it, and the copy, equally often."""
    copied = copy.deepcopy(model)
    for block in blocks(copied):
        fully_shard(block, mesh=device_mesh)
    fully_shard(copied, mesh=device_mesh)
    return copied


def full_tensors(value: Any) -> Any:
    """A nest of values with every split tensor gathered; all processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: full_tensors(inner) for key, inner in value.items()}
    return [full_tensors(inner) for inner in value] if isinstance(value, list) else value


def _share(value: Any, like: Any) -> Any:
    """A whole tensor split as another one of its shape is; anything else as it is."""
    if (
        not isinstance(like, DTensor)
        or not isinstance(value, torch.Tensor)
        or value.shape != like.shape
    ):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that are split in `configure_model`, with checkpoints as any other strategy writes them."""

    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=ranks.world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
        self.cluster_environment = (
            TorchElasticEnvironment()
        )  # reads RANK and its like, and starts nothing

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return full_tensors(self._module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._module.state_dict()
        self._module.load_state_dict(
            {
                name: _share(value, own.get(name))
                for name, value in checkpoint["state_dict"].items()
            },
            strict,
        )

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return full_tensors(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        moments = {
            number: {name: _share(value, parameters[number]) for name, value in kept.items()}
            for number, kept in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": moments})

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module
