"""Restore the structure of a compressed student for a checkpoint, or remove its quantization."""

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compress import fake_quant
from distill.compress.structure import keep_blocks
from distill.compress.widths import head_attributes, skeleton, width_keys
from distill.models.families import linear_layers, stacks
from distill.remote_code.modeling import (
    CompressionConfig,
    build_compressed_layers,
    in_out_features,
    resize,
)

__all__ = ["restore_structure", "strip_quantization"]

log = logging.getLogger("distill")


def restore_structure(student: PreTrainedModel, config: dict[str, Any]) -> None:
    """Restore the structure that a compressed student had when a checkpoint was saved.

    This restores its blocks, widths, low-rank factors and quantizers. Load the weights afterwards:
    the current ones are lost.

    Args:
        student: the student as built before training; changed in place.
        config: the student's config at the time of the checkpoint, as a dictionary.
    """
    _restore_blocks(student, config)
    _restore_widths(student, config)
    compression = CompressionConfig.from_json(config.get("compression"))
    if compression in (CompressionConfig(), CompressionConfig.from_config(student.config)):
        return
    build_compressed_layers(student, replace(compression, activations={}))
    fake_quant.attach_fake_quant(student, compression.weights, compression.activations)
    compression.write_to(student.config)


def _restore_blocks(student: PreTrainedModel, saved: dict[str, Any]) -> None:
    config, target = student.config, type(student.config).from_dict(saved)
    built = stacks(skeleton(student, target))
    counts = [(len(stacks(student)[path]), len(layers)) for path, layers in built.items()]
    if all(now == then for now, then in counts):
        return
    types = config.to_dict().get("layer_types")
    target_types = target.to_dict().get("layer_types")
    remaining: list[int] = []
    start = 0
    for now, then in counts:
        remaining += range(start, start + then)
        start += now
    if len(counts) == 1 and types is not None and target_types is not None:
        positions = iter(range(len(types)))
        remaining = [
            next(i for i in positions if types[i] == layer_type) for layer_type in target_types
        ]
    keep_blocks(student, remaining)


def _restore_widths(student: PreTrainedModel, saved: dict[str, Any]) -> None:
    config, target = student.config, type(student.config).from_dict(saved)
    differing = {
        key: getattr(target, key)
        for key in width_keys(student)
        if hasattr(target, key) and getattr(target, key) != getattr(config, key, None)
    }
    if not differing:
        return
    layers = dict(linear_layers(student))
    for name, layer in linear_layers(skeleton(student, target)):
        if name in layers and in_out_features(layers[name]) != in_out_features(layer):
            resize(layers[name], *in_out_features(layer))
    for key, value in differing.items():
        setattr(config, key, value)
    head_attributes(student, {})


def strip_quantization(model: PreTrainedModel, role: str) -> None:
    """Prepare a model with pruned or quantized weights for further training.

    Its layers no longer quantize their inputs, and its config no longer describes weights as sparse
    or quantized, since training changes them. Widths and low-rank factors stay.

    Args:
        model: changed in place.
        role: ``teacher`` or ``student``, for the log message.
    """
    compression = CompressionConfig.from_config(model.config)
    removed = [part for part in ("weights", "activations", "sparse") if getattr(compression, part)]
    for name in compression.activations:
        layer = model.get_submodule(name)
        layer.__class__ = Conv1D if isinstance(layer, Conv1D) else nn.Linear
        del layer.input_range
    if removed:
        replace(compression, weights={}, activations={}, sparse=[]).write_to(model.config)
        log.info(
            "%s: was compressed (%s) and trains without: add callbacks to compress it again",
            role,
            ", ".join(removed),
        )
