"""Parts of a student that can go as a whole: neurons of a feed-forward network, attention heads, blocks.

G = groups of a block: its neurons, or its heads. A group is a set of slices of parameters, without which the others answer as before:
what fills the group (rows of weights, entries of biases) and what reads it (columns of the output projection). Masked, the slices
are zero; removed, they are gone, and the model answers the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.architectures import architecture, blocks, ffn_width, head_width
from distill.remote_code.modeling import in_out_features


@dataclass(frozen=True)
class Part:
    """What groups own of one parameter: `size` neighbours along `dim` each, one group after the other."""

    layer: nn.Module
    name: str  # weight or bias
    dim: int
    size: int

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.get_parameter(self.name)

    def indices(self, chosen_G: Tensor) -> Tensor:
        """Where along `dim` the chosen groups are."""
        return chosen_G.repeat_interleave(self.size).nonzero().flatten().to(self.parameter.device)


@dataclass(frozen=True)
class Groups:
    """All groups of one kind in one block."""

    inputs: tuple[Part, ...]
    output: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.inputs, self.output)

    @property
    def count(self) -> int:
        return self.output.parameter.shape[self.output.dim] // self.output.size

    @property
    def layers(self) -> list[nn.Module]:
        return list({id(part.layer): part.layer for part in self.parts}.values())


def neurons(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The neurons of a block's feed-forward network; with a gated one, a neuron and its gate."""
    layout = architecture(student.config.model_type)
    inputs = [part for name in layout.ffn for part in _rows(_linear(block, name), 1)]
    return Groups(tuple(inputs), _columns(_linear(block, layout.ffn_out), 1))


def heads(student: PreTrainedModel, block: nn.Module) -> Groups:
    """The attention heads of a block; where query heads share a key and value head, all that share one are one group."""
    layout = architecture(student.config.model_type)
    if not layout.attention:
        raise UserError(
            f"the student is a {student.config.model_type}, but heads can go only where query, key and value are separate layers: "
            "remove neurons or layers in their place"
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
            f"{name} is a {type(layer).__name__}, but parts can be removed only from linear layers: remove them before it is made"
        )
    return layer


def _rows(layer: nn.Module, size: int) -> list[Part]:
    weight = Part(layer, "weight", 1 if isinstance(layer, Conv1D) else 0, size)
    return [weight] if layer.bias is None else [weight, Part(layer, "bias", 0, size)]


def _columns(layer: nn.Module, size: int) -> Part:
    return Part(layer, "weight", 0 if isinstance(layer, Conv1D) else 1, size)


# ---- masked, removed


@torch.no_grad()
def zero(groups: Groups, kept_G: Tensor, optimizer: Optimizer | None = None) -> None:
    """Mask the other groups: their slices, and those of the gradients and moments, become 0."""
    for part in groups.parts:
        parameter, gone = part.parameter, part.indices(~kept_G)
        moments = optimizer.state.get(parameter, {}).values() if optimizer else ()
        for tensor in (parameter, parameter.grad, *moments):
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                tensor.index_fill_(part.dim, gone, 0)


@torch.no_grad()
def remove(groups: Groups, kept_G: Tensor, optimizer: Optimizer | None = None) -> None:
    """Leave only these groups: parameters are replaced by their slices, and so are their moments.

    The optimizer's lists still name the old parameters: :meth:`distill.module.Distillation.restructured` renews them.
    """
    if kept_G.all():
        return
    for part in groups.parts:
        _replace(
            part, partial(torch.index_select, dim=part.dim, index=part.indices(kept_G)), optimizer
        )


@torch.no_grad()
def resize(groups: Groups, count: int) -> None:
    """Make room for that many groups, whose weights are to be loaded."""
    for part in groups.parts:
        shape = list(part.parameter.shape)
        shape[part.dim] = count * part.size
        _replace(part, partial(Tensor.new_zeros, size=shape), None)


def _replace(part: Part, cut: Callable[[Tensor], Tensor], optimizer: Optimizer | None) -> None:
    layer, old = part.layer, part.parameter
    new = nn.Parameter(cut(old.detach()), requires_grad=old.requires_grad)
    setattr(layer, part.name, new)
    if optimizer is not None and old in optimizer.state:
        state = optimizer.state.pop(old).items()
        optimizer.state[new] = {
            key: cut(moment) if isinstance(moment, Tensor) and moment.shape == old.shape else moment
            for key, moment in state
        }
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape  # type: ignore[assignment, misc]


def keep_blocks(student: PreTrainedModel, kept: list[int]) -> None:
    """Leave only these blocks, in their order; the config and the places in a generation cache follow."""
    found, config = blocks(student), student.config
    for place in reversed(range(len(found))):
        if place not in kept:
            del found[place]
    types = config.to_dict().get("layer_types")
    config.num_hidden_layers = len(found)
    if types is not None:
        config.layer_types = [types[place] for place in kept]
    for place, block in enumerate(found):
        for module in block.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = place  # type: ignore[assignment]


# ---- what the config says


def declare(student: PreTrainedModel) -> dict[str, list[int]]:
    """Let the config say the student's widths where it can; returns {layer: [in, out]} of those that it then does not say."""
    config, layout = student.config, architecture(student.config.model_type)
    ffns = [neurons(student, block) for block in blocks(student)]
    width = ffns[0].count
    if width != ffn_width(config) and all(groups.count == width for groups in ffns):
        setattr(config, layout.ffn_width, width)
    unsaid = [groups for groups in ffns if groups.count != ffn_width(config)]
    if layout.attention:
        attentions = [heads(student, block) for block in blocks(student)]
        if layout.heads and len({groups.count for groups in attentions}) == 1:
            _declare_heads(config, layout.heads, attentions[0])
        unsaid += [
            groups
            for groups in attentions
            if in_out_features(groups.output.layer)[0]
            != config.num_attention_heads * head_width(config)
        ]
    names = {id(module): name for name, module in student.named_modules()}
    return {
        names[id(layer)]: list(in_out_features(layer))
        for groups in unsaid
        for layer in groups.layers
    }


def _declare_heads(config: PreTrainedConfig, keys: tuple[str, ...], groups: Groups) -> None:
    """Set the numbers of heads, and the width of one; not where the family's config refuses such numbers."""
    width = head_width(config)
    said = {"head_dim": width} | dict(
        zip(keys, (groups.count * groups.output.size // width, groups.count), strict=True)
    )
    if said["num_attention_heads"] == config.num_attention_heads:
        return
    try:
        type(config).from_dict(config.to_dict() | said)
    except StrictDataclassError:
        return
    for key, value in said.items():
        setattr(config, key, value)


def reshape(student: PreTrainedModel, described: dict[str, Any]) -> None:
    """Give a freshly built student the depth and the widths that a config, a dictionary, says; its weights are to be loaded."""
    config, wanted = student.config, type(student.config).from_dict(described)
    layout = architecture(config.model_type)
    if wanted.num_hidden_layers < config.num_hidden_layers:
        types, wanted_types = (one.to_dict().get("layer_types") for one in (config, wanted))
        keep_blocks(student, _alike(types, wanted_types, wanted.num_hidden_layers))
    if ffn_width(wanted) != ffn_width(config):
        for block in blocks(student):
            resize(neurons(student, block), ffn_width(wanted))
        setattr(config, layout.ffn_width, ffn_width(wanted))
    if any(described[key] != getattr(config, key) for key in layout.heads):
        for block in blocks(student):
            resize(heads(student, block), wanted.num_key_value_heads)
        for key in ("head_dim", *layout.heads):
            setattr(config, key, described[key])


def _alike(types: list[str] | None, wanted: list[str] | None, count: int) -> list[int]:
    """The first blocks that are of the wanted types, in this order."""
    if types is None or wanted is None:
        return list(range(count))
    places = iter(range(len(types)))
    return [next(place for place in places if types[place] == kind) for kind in wanted]
