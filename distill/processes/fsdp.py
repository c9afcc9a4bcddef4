"""`trainer.strategy=fsdp`: models sharded over the ranks and gathered block by block (FSDP2).

Checkpoints hold full tensors under the names and indices of an unsharded model, so that a run can
continue with another strategy.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
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

from distill.processes import ranks
from distill.recipe.config import Trainer

__all__ = ["ShardedStrategy", "device_mesh", "full_tensors", "fully_shard", "shard", "uses_fsdp"]


def uses_fsdp(trainer: Trainer) -> bool:
    """Whether models are sharded; in a single process they are not."""
    return trainer.strategy == "fsdp" and ranks.world_size() > 1


def device_mesh(device: str) -> DeviceMesh:
    """A one-dimensional mesh of all ranks, on devices of this type."""
    return init_device_mesh(device, (ranks.world_size(),))


def shard(
    model: PreTrainedModel,
    blocks: Callable[[PreTrainedModel], Iterable[nn.Module]],
    mesh: DeviceMesh,
) -> PreTrainedModel:
    """Make a sharded copy of a model.

    All ranks must call this, and then the copy's forward, the same number of times.

    Args:
        model: Not changed.
        blocks: Returns the modules of a model that are gathered one at a time.
        mesh: The ranks, and the device that holds the shards.
    """
    sharded = copy.deepcopy(model)
    for block in blocks(sharded):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


def full_tensors(value: Any) -> Any:
    """Gather every sharded tensor in nested dictionaries and lists; all ranks must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: full_tensors(item) for key, item in value.items()}
    return [full_tensors(item) for item in value] if isinstance(value, list) else value


def _shard_like(value: Any, like: Any) -> Any:
    """Shard a full tensor like a DTensor of the same shape; return anything else unchanged."""
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
    """Lightning's strategy for models that `configure_model` shards, with full checkpoints."""

    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=ranks.world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
        # reads RANK and WORLD_SIZE, starts nothing
        self.cluster_environment = TorchElasticEnvironment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return full_tensors(self._module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        current = self._module.state_dict()
        loaded = {
            name: _shard_like(value, current.get(name))
            for name, value in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(loaded, strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return full_tensors(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        moments = {
            index: {name: _shard_like(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
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
