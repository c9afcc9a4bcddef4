"""The structure of a model family, examined on a tiny model of its config.

No table lists families: blocks are the repeated module lists of a model, and everything else is
measured: config keys by building models of changed configs, the rest by `block_structure.py`.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.block_probe import BlockProbe
from distill.models.block_structure import Attention, FeedForward, examine_block
from distill.models.hub import silence_transformers
from distill.models.tiny_models import tiny_config, tiny_model
from distill.remote_code.modeling import LINEAR, LowRank, in_out_features

# Config keys without influence on the structure.
_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "architectures", "id2label"}
_INCIDENTAL |= {"label2id", "compression", "auto_map", "problem_type", "num_labels"}
# Words in the keys of feed-forward widths that are None where they follow from another key.
_WIDTH_WORDS = ("inner", "ff", "intermediate", "hidden")


@dataclass(frozen=True)
class Stack:
    """A list of transformer blocks; an encoder-decoder model has two."""

    path: str  # relative to the model without its head
    count_keys: tuple[str, ...]  # config keys of the number of blocks
    ffn_key: str | None  # config key of the width of the feed-forward network
    attention: Attention | None
    ffn: FeedForward | None


@dataclass(frozen=True)
class Family:
    """The structure of the models of a config."""

    stacks: tuple[Stack, ...]
    passes: int  # how often each block runs; more than once where layers share weights (ALBERT)
    batch_first: bool  # whether hidden states are (examples, tokens, width)


_BY_CONFIG: dict[str, Family] = {}
_BY_MODEL: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def family_of(model: PreTrainedModel) -> Family:
    """The structure of a model's family."""
    if model not in _BY_MODEL:
        _BY_MODEL[model] = examine_family(model.config)
    return _BY_MODEL[model]


def examine_family(config: PreTrainedConfig) -> Family:
    """The structure of a config's family; the global random generator is not used.

    Raises:
        UserError: The family has no repeated blocks, or a tiny model of it does not run.
    """
    key = _key(config)
    if key not in _BY_CONFIG:
        small, factor = tiny_config(config)
        narrow = _key(small)
        if narrow not in _BY_CONFIG:
            _BY_CONFIG[narrow] = _examine(small)
        widened = [_widen(stack, factor) for stack in _BY_CONFIG[narrow].stacks]
        _BY_CONFIG[key] = replace(_BY_CONFIG[narrow], stacks=tuple(widened))
    return _BY_CONFIG[key]


def _key(config: PreTrainedConfig) -> str:
    values = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return json.dumps(values, sort_keys=True, default=str)


def _widen(stack: Stack, factor: int) -> Stack:
    """The structure of a block whose widths are larger by a factor."""
    attention = stack.attention
    if attention is None:
        return stack
    counts = tuple(
        (name, key, value * (factor if value >= attention.head_width else 1))
        for name, key, value in attention.counts
    )
    width = attention.head_width * factor
    return replace(stack, attention=replace(attention, head_width=width, counts=counts))


def _examine(config: PreTrainedConfig) -> Family:
    """The structure of a tiny model."""
    model = tiny_model(config)
    lists = block_lists(model)
    if not lists:
        raise UserError(
            f"the architecture is {config.model_type}, but its model has no list of equal blocks: "
            "leave out student.layers, loss.terms and techniques that remove parts"
        )
    stacks, probes = [], []
    try:
        for path, blocks in lists.items():
            probes.append(BlockProbe(model, blocks[0]))
            stacks.append(_stack(config, path, blocks, probes[-1]))
    except Exception as error:
        raise UserError(
            f"the architecture is {config.model_type}, but a small model of its config does not "
            f"run ({type(error).__name__}: {error}): "
            "leave out student.layers, loss.terms and techniques that remove parts"
        ) from error
    batch_first = probes[0].states.shape[0] == 1
    return Family(tuple(stacks), max(probe.calls for probe in probes), batch_first)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of one class with linear layers, by their paths."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and _are_blocks(module):
            lists[path] = module
    return lists


def _are_blocks(modules: nn.ModuleList) -> bool:
    kinds = (*LINEAR, LowRank)
    linear = [sum(isinstance(each, kinds) for each in block.modules()) for block in modules]
    return len({type(block) for block in modules}) == 1 and min(linear) >= 2


def _stack(config: PreTrainedConfig, path: str, blocks: nn.ModuleList, probe: BlockProbe) -> Stack:
    attention, ffn = examine_block(probe)
    layers = {tuple(name for name, _ in linear_layers(block)) for block in blocks}
    if len(layers) > 1:  # blocks of several kinds, as in mixtures of experts
        attention = ffn = None
    ffn_key = None if ffn is None else _ffn_key(config, path, ffn, blocks[0])
    return Stack(path, _count_keys(config, path, len(blocks)), ffn_key, attention, ffn)


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in a module, by name."""
    for name, each in module.named_modules():
        if isinstance(each, LINEAR):
            yield name, each


def _count_keys(config: PreTrainedConfig, path: str, count: int) -> tuple[str, ...]:
    """Config keys that alone decide how many blocks a list has."""
    changed = count - 1 if count > 1 else count + 1
    keys = []
    for key, value in config.to_dict().items():
        if type(value) is int and value == count and "layer" in key:
            lists = _skeleton_lists(config, {key: changed})
            if lists and len(lists.get(path, ())) == changed:
                keys.append(key)
    return tuple(keys)


def _ffn_key(config: PreTrainedConfig, path: str, ffn: FeedForward, block: nn.Module) -> str | None:
    """The config key that alone decides the width of the feed-forward network; None if none."""
    width = in_out_features(block.get_submodule(ffn.output))[0]
    for key, value in config.to_dict().items():
        named = value is None and any(word in key for word in _WIDTH_WORDS)
        if named or (type(value) is int and value == width):
            lists = _skeleton_lists(config, {key: 2 * width})
            if not lists or path not in lists:
                continue
            new = dict(linear_layers(lists[path][0]))
            if _widths(new, ffn) == [2 * each for each in _widths(dict(linear_layers(block)), ffn)]:
                return key
    return None


def _widths(layers: dict[str, nn.Module], ffn: FeedForward) -> list[int]:
    inputs = [in_out_features(layers[name])[1] for name in ffn.inputs]
    return [in_out_features(layers[ffn.output])[0], *inputs]


def _skeleton_lists(
    config: PreTrainedConfig, values: dict[str, Any]
) -> dict[str, nn.ModuleList] | None:
    """The blocks of a model of a changed config, without memory; None if it does not build."""
    changed = copy.deepcopy(config)
    try:
        for key, value in values.items():
            setattr(changed, key, value)
        with torch.device("meta"), silence_transformers():
            return block_lists(AutoModel.from_config(changed))
    except Exception:  # noqa: BLE001 - whatever a config class raises on such values
        return None


def stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of transformer blocks of a model, by their paths in `model.base_model`.

    Raises:
        UserError: The model has none.
    """
    lists = block_lists(model.base_model)
    if not lists:
        raise UserError(
            f"the architecture is {model.config.model_type}, but its model has no list of equal "
            "blocks: leave out student.layers, loss.terms and techniques that change blocks"
        )
    return lists


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks of a model, first to last; those of the encoder first."""
    return [block for modules in stacks(model).values() for block in modules]


def stack_of(model: PreTrainedModel, block: nn.Module) -> Stack:
    """The structure of one of :func:`blocks`."""
    lists = stacks(model)
    path = next(path for path, modules in lists.items() if any(each is block for each in modules))
    return next(stack for stack in family_of(model).stacks if stack.path == path)
