"""Quantization after training: of weights, and of inputs calibrated on training examples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import models
from distill.compress.quantizable import activation_layers, default_layers
from distill.compress.quantizer import QuantSpec, default_group_size, fake_quantize_weight
from distill.remote_code.modeling import CompressionConfig, quantize_input


def quantize_model(
    student: PreTrainedModel, mode: str, bits: int, examples: Iterable[dict[str, Tensor]]
) -> None:
    """Quantize the weights of a student, and inputs of its linear layers to 8 bits.

    Weights are quantized as :class:`distill.callbacks.Quantize` does: 8 bits are symmetric with a
    scale per row, fewer are affine with a scale per group.

    Args:
        student: changed in place, with its config.
        mode: `export.quantize`: ``weights`` only, or with inputs: ``dynamic`` (the range of each
            token) or ``static`` (a fixed range).
        bits: bits per weight, 2 to 8.
        examples: inputs from which the ranges of ``static`` are computed.
    """
    layers = default_layers(student)
    compression = CompressionConfig.from_config(student.config)
    compression.weights = {
        f"{name}.weight": _quantize_weight(layer, bits, f"{name}.weight" in compression.sparse)
        for name, layer in layers.items()
    }
    if mode != "weights":
        linear = activation_layers(student, layers)
        ranges: Mapping[str, list[float] | None] = (
            observe_ranges(student, linear, examples) if mode == "static" else dict.fromkeys(linear)
        )
        compression.activations = {name: ranges[name] for name in linear if name in ranges}
        for name, input_range in compression.activations.items():
            quantize_input(linear[name], input_range)
    compression.write_to(student.config)


@torch.no_grad()
def _quantize_weight(layer: nn.Module, bits: int, sparse: bool) -> dict[str, Any]:
    """Quantize the layer's weight in place, and return the fields of its `QuantSpec`."""
    weight = layer.get_parameter("weight")
    weight_OI = weight.T if isinstance(layer, Conv1D) else weight
    group = default_group_size(bits, weight_OI.shape[1])
    spec = QuantSpec(bits=bits, symmetric=bits == 8, group=group)
    weight_OI.copy_(fake_quantize_weight(weight_OI, spec, sparse))
    return spec.as_dict()


@torch.inference_mode()
def observe_ranges(
    student: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    examples: Iterable[dict[str, Tensor]],
) -> dict[str, list[float]]:
    """The range of each layer's inputs over the examples.

    Returns:
        Name -> [lowest, highest], without the layers that no example reaches.
    """
    ranges: dict[str, list[float]] = {}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = (float(end) for end in inputs[0].aminmax())
            earlier = ranges.get(name, [low, high])
            ranges[name] = [min(low, earlier[0]), max(high, earlier[1])]

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    for inputs in examples:
        models.logits(student, inputs)
    for handle in handles:
        handle.remove()
    return ranges
