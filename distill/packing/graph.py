"""Code shared by the modules that write a runtime's model file."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import models
from distill.compress.quantizer import QuantSpec
from distill.recipe import capabilities
from distill.remote_code.modeling import LINEAR


@dataclass(frozen=True)
class GraphOptions:
    """Options for writing the model file of a runtime.

    Args:
        inputs: names of the model's inputs, in the order of the graph.
        max_length: tokens of the longest text.
        cache: whether keys and values of earlier tokens may be inputs and outputs.
        quantize: quantization of layers that training did not quantize: None, ``weights``,
            ``dynamic`` or ``static``.
        calibration: inputs from which the ranges of ``static`` are computed.
        dtype: float type that the runtime computes in.
    """

    inputs: list[str]
    max_length: int
    cache: bool = False
    quantize: str | None = None
    calibration: Iterable[dict[str, Tensor]] = ()
    dtype: str = "float32"


class LogitsModule(nn.Module):
    """A model with positional inputs that returns the logits."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return models.logits(self.model, dict(zip(self.names, inputs, strict=True)))


def input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """Names of the tokenizer's outputs that the model accepts as inputs."""
    return [name for name in tokenizer.model_input_names if name in models.forward_arguments(model)]


def check_quantized(
    format: str,
    name: str,
    layers: Collection[nn.Module],
    spec: QuantSpec,
    quantize: str | None = None,
    activations: str | None = None,
) -> None:
    """Check that a runtime supports a quantized weight.

    Args:
        format: `export.format`.
        name: name of the weight in the state dict.
        layers: modules that hold it.
        spec: how it is quantized.
        quantize: `export.quantize`.
        activations: quantization of the inputs of linear layers: None, ``dynamic`` or ``static``.

    Raises:
        UserError: if the runtime does not support it.
    """
    if any(isinstance(layer, LINEAR) for layer in layers):
        capabilities.check_tensor(format, quantize, name, spec, activations)
    else:
        capabilities.check_embedding(format, name, spec)
