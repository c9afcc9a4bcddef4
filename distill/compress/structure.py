"""Groups of weights that are removed together: neurons, attention heads, blocks.

A group consists of slices of parameters: the weight rows and bias entries that compute it, and the
columns of the output projection that multiply it. Removing a group does not change the outputs of
other groups, and the model's outputs are the same as with the group set to zero.

Shapes: G = groups of a block: its neurons, or its heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.block_structure import Attention
from distill.models.families import stack_of, stacks
from distill.models.layer_proof import shorten_config
from distill.remote_code.modeling import in_out_features

__all__ = [
    "Groups",
    "ParameterSlice",
    "heads",
    "keep_blocks",
    "neurons",
    "remove_groups",
    "set_head_counts",
    "zero_groups",
]

_INDICES = {"layer_idx", "layer_id", "layer_index", "layer_number"}


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter as groups of entries along a dimension.

    The dimension has one section or several, such as those of query, key and value in a fused
    layer. In each section the groups lie one after the other.

    Args:
        layer: the module of the parameter.
        name: ``weight`` or ``bias``.
        dim: the dimension along which the groups lie.
        sizes: entries along `dim` in a group, for each section.
    """

    layer: nn.Module
    name: str
    dim: int
    sizes: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.get_parameter(self.name)

    def indices(self, mask_G: Tensor) -> Tensor:
        """The indices along `dim` of the groups where the mask is True."""
        entries = torch.cat([mask_G.repeat_interleave(size) for size in self.sizes])
        return entries.nonzero().flatten().to(self.parameter.device)

    def by_group(self, tensor: Tensor) -> Tensor:
        """The entries of each group in a tensor of the parameter's shape: (G, entries)."""
        count = tensor.shape[self.dim] // sum(self.sizes)
        sections = tensor.movedim(self.dim, 0).split([count * size for size in self.sizes])
        entries = [section.reshape(count, -1) for section in sections]
        return entries[0] if len(entries) == 1 else torch.cat(entries, 1)


@dataclass(frozen=True)
class Groups:
    """All neurons, or all heads, of a block.

    Args:
        inputs: the parameters that compute them.
        output: the weight of the output projection that multiplies them.
    """

    inputs: tuple[ParameterSlice, ...]
    output: ParameterSlice

    @property
    def slices(self) -> tuple[ParameterSlice, ...]:
        return (*self.inputs, self.output)

    @property
    def count(self) -> int:
        return self.output.parameter.shape[self.output.dim] // sum(self.output.sizes)

    @property
    def layers(self) -> list[nn.Module]:
        return list({id(part.layer): part.layer for part in self.slices}.values())


def neurons(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The neurons of a block's feed-forward network, each with its gate if there is one.

    Raises:
        UserError: the network has another structure, such as several experts.
    """
    network = stack_of(student, block).ffn
    if network is None:
        raise UserError(
            f"the architecture is {student.config.model_type}, but neurons can be removed only "
            "where each block has one feed-forward network of linear layers: remove layers instead"
        )
    sizes = {"": (1,), "halves": (1, 1), "pairs": (2,)}[network.fused]
    inputs = [part for name in network.inputs for part in _rows(_linear(block, name), *sizes)]
    return Groups(tuple(inputs), _columns(_linear(block, network.output), 1))


def heads(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The attention heads of a block. Query heads that share a key and value head are one group.

    Raises:
        UserError: the attention has another structure.
    """
    attention = stack_of(student, block).attention
    if attention is None:
        raise UserError(
            f"the architecture is {student.config.model_type}, but heads can be removed only where "
            "query, key and value are outputs of linear layers, one head beside the other: remove "
            "neurons or layers instead"
        )
    width, group_width = attention.head_width, attention.head_width * attention.shared
    if attention.fused == "concatenated":
        inputs = _rows(_linear(block, attention.query), group_width, width, width)
    elif attention.fused == "interleaved":
        inputs = _rows(_linear(block, attention.query), group_width + 2 * width)
    else:
        layers = [_linear(block, name) for name in _separate(attention)]
        sizes = (group_width, width, width)
        inputs = [
            part for layer, size in zip(layers, sizes, strict=True) for part in _rows(layer, size)
        ]
    output = _columns(_linear(block, attention.output), group_width)
    count = output.parameter.shape[output.dim] // group_width
    for name in attention.extra:
        layer = _linear(block, name)
        inputs += _rows(layer, in_out_features(layer)[1] // count)
    return Groups(tuple(inputs), output)


def _separate(attention: Attention) -> tuple[str, str, str]:
    return attention.query, attention.key, attention.value


def set_head_counts(student: PreTrainedModel, block: nn.Module) -> dict[str, dict[str, int]]:
    """Set the attributes of a block's attention that count its heads, after some were removed.

    Returns:
        Name of the module in the block -> attribute -> value, of those that the forward reads.
    """
    attention = stack_of(student, block).attention
    if attention is None or not attention.counts:
        return {}
    count = heads(student, block).count
    values: dict[str, dict[str, int]] = {}
    for name, attribute, of_each in attention.counts:
        values.setdefault(name, {})[attribute] = of_each * count
        setattr(block.get_submodule(name), attribute, of_each * count)
    return values


def _linear(block: nn.Module, name: str) -> nn.Module:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise UserError(
            f"{name} is a {type(layer).__name__}, but neurons and heads can be removed only from "
            "linear layers: remove them before it is factorized"
        )
    return layer


def _rows(layer: nn.Module, *sizes: int) -> list[ParameterSlice]:
    weight = ParameterSlice(layer, "weight", 1 if isinstance(layer, Conv1D) else 0, sizes)
    return [weight] if layer.bias is None else [weight, ParameterSlice(layer, "bias", 0, sizes)]


def _columns(layer: nn.Module, size: int) -> ParameterSlice:
    return ParameterSlice(layer, "weight", 0 if isinstance(layer, Conv1D) else 1, (size,))


@torch.no_grad()
def zero_groups(groups: Groups, kept_G: Tensor, optimizer: Optimizer | None = None) -> None:
    """Set the groups outside of a mask to 0, with their gradients and the optimizer's moments.

    Args:
        groups: groups of one block.
        kept_G: mask, False where a group is set to 0.
        optimizer: its moments of these parameters are set to 0 too.
    """
    for part in groups.slices:
        parameter, removed = part.parameter, part.indices(~kept_G)
        moments = optimizer.state.get(parameter, {}).values() if optimizer else ()
        for tensor in (parameter, parameter.grad, *moments):
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                tensor.index_fill_(part.dim, removed, 0)


@torch.no_grad()
def remove_groups(groups: Groups, kept_G: Tensor, optimizer: Optimizer | None = None) -> None:
    """Remove the groups outside of a mask: parameters and moments are replaced by their slices.

    The optimizer's parameter groups still hold the old parameters:
    :meth:`distill.module.Distillation.refresh_optimizer_params` replaces them.

    Args:
        groups: groups of one block.
        kept_G: mask, False where a group is removed.
        optimizer: its moments of these parameters are sliced too.
    """
    if kept_G.all():
        return
    for part in groups.slices:
        select = partial(torch.index_select, dim=part.dim, index=part.indices(kept_G))
        _replace(part, select, optimizer)


def _replace(
    part: ParameterSlice, change: Callable[[Tensor], Tensor], optimizer: Optimizer | None
) -> None:
    """Apply `change` to a parameter and to its moments, and update the sizes of its layer."""
    layer, old = part.layer, part.parameter
    new = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
    setattr(layer, part.name, new)
    if optimizer is not None and old in optimizer.state:
        optimizer.state[new] = {
            key: change(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in optimizer.state.pop(old).items()
        }
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape  # type: ignore[assignment, misc]


def keep_blocks(student: PreTrainedModel, remaining: list[int]) -> None:
    """Remove all other blocks, and update the config and the blocks' indices in a key-value cache.

    Args:
        student: changed in place.
        remaining: positions of the blocks to keep, in ascending order.

    Raises:
        UserError: the family needs all its blocks, or some of those that are removed.
    """
    shortened, start = shorten_config(student.config, remaining), 0
    for layers in stacks(student).values():
        first, count = layers[0], len(layers)
        for position in reversed(range(count)):
            if start + position not in remaining:
                del layers[position]
        _move_extras(first, layers[0])
        for position, block in enumerate(layers):
            for module in block.modules():
                for name in _INDICES & vars(module).keys():
                    setattr(module, name, position)
        start += count
    before, after = student.config.to_dict(), shortened.to_dict()
    for key in after:
        if after[key] != before.get(key):
            setattr(student.config, key, getattr(shortened, key))


def _move_extras(old: nn.Module, new: nn.Module) -> None:
    """Give the new first block the modules that only the first one has, as in T5."""
    modules = dict(new.named_modules())
    for name, extra in old.named_modules():
        parent, _, last = name.rpartition(".")
        if name in modules or parent not in modules:
            continue
        owner, former = modules[parent], old.get_submodule(parent)
        owner.add_module(last, extra)
        for attribute, value in vars(former).items():
            if isinstance(value, bool) and attribute != "training":
                setattr(owner, attribute, value)
