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
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.architectures import architecture, blocks, ffn_width, head_width
from distill.remote_code.modeling import in_out_features

__all__ = [
    "Groups",
    "ParameterSlice",
    "heads",
    "keep_blocks",
    "neurons",
    "remove_groups",
    "resize_groups",
    "update_config",
    "zero_groups",
]


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter as consecutive groups of `size` entries along a dimension.

    Args:
        layer: the module of the parameter.
        name: ``weight`` or ``bias``.
        dim: the dimension along which the groups lie.
        size: entries along `dim` in a group.
    """

    layer: nn.Module
    name: str
    dim: int
    size: int

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.get_parameter(self.name)

    def indices(self, mask_G: Tensor) -> Tensor:
        """The indices along `dim` of the groups where the mask is True."""
        return mask_G.repeat_interleave(self.size).nonzero().flatten().to(self.parameter.device)


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
        return self.output.parameter.shape[self.output.dim] // self.output.size

    @property
    def layers(self) -> list[nn.Module]:
        return list({id(part.layer): part.layer for part in self.slices}.values())


def neurons(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The neurons of a block's feed-forward network, each with its gate if there is one."""
    layout = architecture(student.config.model_type)
    inputs = [part for name in layout.ffn for part in _rows(_linear(block, name), 1)]
    return Groups(tuple(inputs), _columns(_linear(block, layout.ffn_out), 1))


def heads(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The attention heads of a block. Query heads that share a key and value head are one group.

    Raises:
        UserError: if query, key and value are not separate layers in this family.
    """
    layout = architecture(student.config.model_type)
    if not layout.attention:
        raise UserError(
            f"the student is a {student.config.model_type}, but heads can be removed only where "
            "query, key and value are separate layers: remove neurons or layers instead"
        )
    query, key, value = (_linear(block, name) for name in layout.attention)
    width = head_width(student.config)
    shared = width * (in_out_features(query)[1] // in_out_features(key)[1])
    inputs = [*_rows(query, shared), *_rows(key, width), *_rows(value, width)]
    return Groups(tuple(inputs), _columns(_linear(block, layout.attention_out), shared))


def _linear(block: nn.Module, name: str) -> nn.Module:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise UserError(
            f"{name} is a {type(layer).__name__}, but neurons and heads can be removed only from "
            "linear layers: remove them before it is factorized"
        )
    return layer


def _rows(layer: nn.Module, size: int) -> list[ParameterSlice]:
    weight = ParameterSlice(layer, "weight", 1 if isinstance(layer, Conv1D) else 0, size)
    return [weight] if layer.bias is None else [weight, ParameterSlice(layer, "bias", 0, size)]


def _columns(layer: nn.Module, size: int) -> ParameterSlice:
    return ParameterSlice(layer, "weight", 0 if isinstance(layer, Conv1D) else 1, size)


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


@torch.no_grad()
def resize_groups(groups: Groups, count: int) -> None:
    """Replace the parameters by zeros of the shapes for `count` groups, before loading weights."""
    for part in groups.slices:
        shape = list(part.parameter.shape)
        shape[part.dim] = count * part.size
        _replace(part, partial(Tensor.new_zeros, size=shape), None)


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
    """
    layers, config = blocks(student), student.config
    for position in reversed(range(len(layers))):
        if position not in remaining:
            del layers[position]
    types = config.to_dict().get("layer_types")
    config.num_hidden_layers = len(layers)
    if types is not None:
        config.layer_types = [types[position] for position in remaining]
    for position, block in enumerate(layers):
        for module in block.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = position  # type: ignore[assignment]


def update_config(student: PreTrainedModel) -> dict[str, list[int]]:
    """Write the widths of a pruned student to its config, as far as its keys can describe them.

    Returns:
        Layers whose widths the config cannot describe: name -> [in_features, out_features].
    """
    config, layout = student.config, architecture(student.config.model_type)
    ffns = [neurons(student, block) for block in blocks(student)]
    width = ffns[0].count
    if width != ffn_width(config) and all(groups.count == width for groups in ffns):
        setattr(config, layout.ffn_width, width)
    irregular = [groups for groups in ffns if groups.count != ffn_width(config)]
    if layout.attention:
        attentions = [heads(student, block) for block in blocks(student)]
        if layout.heads and len({groups.count for groups in attentions}) == 1:
            _update_heads(config, layout.heads, attentions[0])
        width = config.num_attention_heads * head_width(config)
        irregular += [
            groups for groups in attentions if in_out_features(groups.output.layer)[0] != width
        ]
    names = {id(module): name for name, module in student.named_modules()}
    return {
        names[id(layer)]: list(in_out_features(layer))
        for groups in irregular
        for layer in groups.layers
    }


def _update_heads(config: PreTrainedConfig, keys: tuple[str, ...], groups: Groups) -> None:
    """Set the numbers of heads and their width, unless the config class rejects them."""
    width = head_width(config)
    counts = (groups.count * groups.output.size // width, groups.count)
    values = {"head_dim": width} | dict(zip(keys, counts, strict=True))
    if values["num_attention_heads"] == config.num_attention_heads:
        return
    try:
        type(config).from_dict(config.to_dict() | values)
    except StrictDataclassError:
        return
    for key, value in values.items():
        setattr(config, key, value)
