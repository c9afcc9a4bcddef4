"""Widths of a pruned student -> its config, as far as the keys of its family can describe them."""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.compress.structure import heads, neurons, set_head_counts
from distill.models.families import family_of, linear_layers, stacks
from distill.models.hub import silence_transformers
from distill.remote_code.modeling import in_out_features

__all__ = ["HEAD_KEYS", "head_attributes", "skeleton", "update_config", "width_keys"]

HEAD_KEYS = ("head_dim", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


def skeleton(student: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the student's class as transformers builds it from a config, without memory."""
    config = copy.deepcopy(config)
    if "compression" in vars(config):
        config.compression = None
    with torch.device("meta"), silence_transformers():
        return type(student)(config)


def width_keys(student: PreTrainedModel) -> set[str]:
    """The config keys that may describe the widths of a pruned student."""
    keys = {stack.ffn_key for stack in family_of(student).stacks if stack.ffn_key}
    return keys | {*HEAD_KEYS}


def update_config(student: PreTrainedModel) -> dict[str, list[int]]:
    """Write the widths of a pruned student to its config, as far as its keys can describe them.

    Returns:
        Layers whose widths the config cannot describe: name -> [in_features, out_features].
    """
    irregular = _irregular(student, student.config)
    if irregular:
        _update_ffn_widths(student, irregular)
        _update_heads(student)
        irregular = _irregular(student, student.config)
    return irregular


def _irregular(student: PreTrainedModel, config: PreTrainedConfig) -> dict[str, list[int]]:
    expected = {name: in_out_features(layer) for name, layer in _linear(skeleton(student, config))}
    widths = {name: in_out_features(layer) for name, layer in _linear(student)}
    return {
        name: list(width)
        for name, width in widths.items()
        if name in expected and width != expected[name]
    }


def _linear(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return list(linear_layers(model))


def _update_ffn_widths(student: PreTrainedModel, irregular: dict[str, list[int]]) -> None:
    """Set each key of a feed-forward width whose blocks are all equally wide."""
    names = {id(module): name for name, module in student.named_modules()}
    widths: dict[str, set[int]] = {}
    changed: set[str] = set()
    modules = stacks(student)
    for stack in family_of(student).stacks:
        for block in modules.get(stack.path, ()):
            if stack.ffn_key is not None:
                groups = neurons(student, block)
                widths.setdefault(stack.ffn_key, set()).add(groups.count)
                if any(names[id(layer)] in irregular for layer in groups.layers):
                    changed.add(stack.ffn_key)
    for key in changed:
        if len(widths[key]) == 1:
            setattr(student.config, key, widths[key].pop())


def _update_heads(student: PreTrainedModel) -> None:
    """Set the numbers of heads and their width, unless the config cannot describe them."""
    config, values = student.config, _head_values(student)
    if not values or values["num_attention_heads"] == config.num_attention_heads:
        return
    try:
        type(config).from_dict(config.to_dict() | values)
    except StrictDataclassError:
        return
    described = copy.deepcopy(config)
    for key, value in values.items():
        setattr(described, key, value)
    try:
        irregular = _irregular(student, described)
    except (ValueError, RuntimeError):  # for example: heads that do not divide the width
        return
    if not irregular.keys() & _attention_names(student):
        for key, value in values.items():
            setattr(config, key, value)


def _attention_names(student: PreTrainedModel) -> set[str]:
    names = {id(module): name for name, module in student.named_modules()}
    return {
        names[id(layer)]
        for block in _attention_blocks(student)
        for layer in heads(student, block).layers
    }


def _attention_blocks(student: PreTrainedModel) -> list[nn.Module]:
    modules = stacks(student)
    return [
        block
        for stack in family_of(student).stacks
        if stack.attention is not None
        for block in modules.get(stack.path, ())
    ]


def _head_values(student: PreTrainedModel) -> dict[str, int]:
    """The keys of heads if all blocks have as many; empty otherwise."""
    attentions = [stack.attention for stack in family_of(student).stacks if stack.attention]
    counts = {heads(student, block).count for block in _attention_blocks(student)}
    shapes = {(attention.head_width, attention.shared) for attention in attentions}
    read_only = isinstance(getattr(type(student.config), "head_dim", None), property)
    if len(counts) != 1 or len(shapes) != 1 or read_only:
        return {}
    (count,), ((width, shared),) = counts, shapes
    values = {"head_dim": width, "num_attention_heads": count * shared}
    known = student.config.to_dict()
    return values | {key: count for key in HEAD_KEYS[2:] if known.get(key) is not None}


def head_attributes(
    student: PreTrainedModel, shapes: dict[str, list[int]]
) -> dict[str, dict[str, int]]:
    """Attributes that count the heads of blocks whose attention the config does not describe.

    Args:
        student: its attributes are set to the numbers of its heads.
        shapes: the result of :func:`update_config`.

    Returns:
        Name of the module -> attribute -> value.
    """
    names = {id(module): name for name, module in student.named_modules()}
    attributes: dict[str, dict[str, int]] = {}
    for block in _attention_blocks(student):
        values: dict[str, dict[str, Any]] = set_head_counts(student, block)
        if values and any(names[id(layer)] in shapes for layer in heads(student, block).layers):
            attributes |= {
                ".".join(filter(None, (names[id(block)], name))): value
                for name, value in values.items()
            }
    return attributes
