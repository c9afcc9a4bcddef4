"""Cutting layers out of any family, proven on a tiny model before a large one is cut.

The law: a student of some layers has the exact outputs of its teacher without the other layers.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.block_probe import block_input
from distill.models.families import Family, blocks, examine_family, family_of, stacks
from distill.models.hub import silence_transformers
from distill.models.tiny_models import tiny_config, tiny_model, tiny_outputs

_PRECISION = 1e-6  # of equal outputs, relative to the largest: some norms compute in float32
_WAY_OUT = "keep other layers, or set student.model or student.config in place of student.layers"
_PROVEN: dict[tuple[str, tuple[int, ...]], str | None] = {}


def layer_count(model: PreTrainedModel) -> int:
    """The layers that may be selected: blocks, or the runs of a block whose weights they share."""
    passes = family_of(model).passes
    return passes if passes > 1 else len(blocks(model))


def shorten_config(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """A config with these layers only, including settings with a value for each layer.

    Args:
        config: The config of the model with all layers; it is not changed.
        layers: The layers to keep, from 0; those of an encoder before those of its decoder.

    Raises:
        UserError: The law above does not hold.
    """
    small, _ = tiny_config(config)
    family = examine_family(config)
    counts = _counts(small, family)
    if layers == [*range(sum(counts))]:
        return copy.deepcopy(config)
    by_stack = _by_stack(counts, layers)
    shortened = _shorten(config, family, by_stack)
    key = small.to_json_string(use_diff=False), tuple(sorted(layers))
    if key not in _PROVEN:
        _PROVEN[key] = _prove(small, family, by_stack)
    scaled = _PROVEN[key]
    if scaled is not None:
        setattr(shortened, scaled, getattr(config, scaled) * _depth_factor(counts, by_stack))
    return shortened


def _counts(config: PreTrainedConfig, family: Family) -> list[int]:
    """The number of layers of each stack."""
    if family.passes > 1:
        return [family.passes]
    with torch.device("meta"), silence_transformers():
        return [len(modules) for modules in stacks(AutoModel.from_config(config)).values()]


def _by_stack(counts: list[int], layers: list[int]) -> list[list[int]]:
    """Layers of each stack, counted from 0 in each."""
    split, start = [], 0
    for count in counts:
        split.append([layer - start for layer in layers if start <= layer < start + count])
        if not split[-1]:
            raise UserError(
                f"the layers to keep are {layers}, but none of {start} to {start + count - 1} is "
                "among them, and encoder and decoder need at least one each: name one of these too"
            )
        start += count
    return split


def _shorten(
    config: PreTrainedConfig, family: Family, by_stack: list[list[int]]
) -> PreTrainedConfig:
    shortened = copy.deepcopy(config)
    if family.passes > 1:
        shortened.num_hidden_layers = len(by_stack[0])
        return shortened
    for stack, layers in zip(family.stacks, by_stack, strict=True):
        if not stack.count_keys:
            raise UserError(
                f"the architecture is {config.model_type}, but no key of its config is the number "
                f"of its layers: {_WAY_OUT}"
            )
        count = getattr(config, stack.count_keys[0])
        for key in stack.count_keys:
            setattr(shortened, key, len(layers))
        for key, values in config.to_dict().items():
            if "layer" in key and isinstance(values, list | tuple) and len(values) == count:
                setattr(shortened, key, [values[layer] for layer in layers])
    return shortened


def _depth_factor(counts: list[int], by_stack: list[list[int]]) -> float:
    """The factor of a residual scale that is divided by the root of the number of layers."""
    return math.sqrt(sum(map(len, by_stack)) / sum(counts))


def _prove(config: PreTrainedConfig, family: Family, by_stack: list[list[int]]) -> str | None:
    """Prove the law on a tiny model, for these layers in ascending order.

    Returns:
        A config key that must be scaled with the depth, as for MiniCPM; None for most families.
    """
    by_stack = [sorted(layers) for layers in by_stack]
    teacher = tiny_model(config)
    counts = _counts(config, family)
    selected, start = [], 0
    for count, layers in zip(counts, by_stack, strict=True):
        selected += [start + layer for layer in layers]
        start += count
    expected = _skipped_outputs(teacher, family, selected)
    shortened = _shorten(config, family, by_stack)
    if _agree(_student_outputs(shortened, teacher, selected), expected):
        return None
    factor = _depth_factor(counts, by_stack)
    for key, value in config.to_dict().items():
        if isinstance(value, float):
            scaled = copy.deepcopy(shortened)
            setattr(scaled, key, value * factor)
            if _agree(_student_outputs(scaled, teacher, selected), expected):
                return key
    raise UserError(
        f"the layers to keep are {selected} of a {config.model_type}, but with its settings a "
        f"model of some layers has other outputs than one that skips the others: {_WAY_OUT}"
    )


def _student_outputs(
    config: PreTrainedConfig, teacher: PreTrainedModel, layers: list[int]
) -> Tensor:
    student = tiny_model(config)
    copied = copy_blocks(student, teacher, layers)
    missing = student.state_dict().keys() - copied.keys()
    assert not missing, f"{sorted(missing)} have no source"
    return tiny_outputs(student)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return bool((actual - expected).abs().max() <= _PRECISION * scale)


def _skipped_outputs(teacher: PreTrainedModel, family: Family, selected: list[int]) -> Tensor:
    """The outputs of a model with the input of each other layer in place of its output."""
    handles = []
    if family.passes > 1:
        calls = iter(range(family.passes))
        skip = _skip_unless(lambda: next(calls) in selected)
        handles.append(blocks(teacher)[0].register_forward_hook(skip, with_kwargs=True))
    else:
        for position, block in enumerate(blocks(teacher)):
            if position not in selected:
                skip = _skip_unless(lambda: False)
                handles.append(block.register_forward_hook(skip, with_kwargs=True))
    outputs = tiny_outputs(teacher)
    for handle in handles:
        handle.remove()
    return outputs


def _skip_unless(runs: Any) -> Any:
    def hook(block: nn.Module, arguments: Any, named: Any, output: Any) -> Any:
        if runs():
            return output
        states = block_input(arguments, named)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


@torch.no_grad()
def copy_blocks(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int]
) -> dict[str, str]:
    """Copy the tensors of a student of some layers from its teacher of the same family.

    A tensor that only the first block of a list has (T5's relative positions) comes from there.

    Returns:
        Student's tensor -> teacher's tensor; without those whose shapes differ.

    Raises:
        UserError: A block has tensors that it would not have at its new position.
    """
    targets, sources = student.state_dict(), teacher.state_dict()
    names = _block_names(student, teacher, layers)
    copied = {}
    for target, tensor in targets.items():
        name = names.get(target, target)
        if name not in sources and name in names.values():
            name = _first_block_name(name, teacher)
        if name in sources and sources[name].shape == tensor.shape:
            tensor.copy_(sources[name])
            copied[target] = name
    lost = [name for target, name in names.items() if target not in targets and name in sources]
    if lost:
        raise UserError(
            f"the layers to keep are {layers}, but {lost[0]} has no place in a "
            f"{teacher.config.model_type} that begins with its layer: begin with layer 0"
        )
    return copied


def _prefixes(model: PreTrainedModel) -> list[str]:
    outer = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [f"{outer}{path}." for path in stacks(model)]


def _block_names(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int]
) -> dict[str, str]:
    """Student's name -> teacher's name, of every tensor that either has in a block of `layers`."""
    if family_of(teacher).passes > 1:
        return {}
    names: dict[str, str] = {}
    start = 0
    pairs = zip(_prefixes(student), stacks(student).values(), stacks(teacher).values(), strict=True)
    for prefix, new, old in pairs:
        selected = [layer - start for layer in layers if start <= layer < start + len(old)]
        for position, layer in enumerate(selected):
            inner = new[position].state_dict().keys() | old[layer].state_dict().keys()
            names |= {f"{prefix}{position}.{name}": f"{prefix}{layer}.{name}" for name in inner}
        start += len(old)
    return names


def _first_block_name(name: str, teacher: PreTrainedModel) -> str:
    for prefix in _prefixes(teacher):
        if name.startswith(prefix):
            return f"{prefix}0.{name.removeprefix(prefix).partition('.')[2]}"
    return name
