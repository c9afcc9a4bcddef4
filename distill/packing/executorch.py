"""A student -> `model.pte`, an ExecuTorch program for XNNPACK, in float32 or int8.

Weights quantized in training keep their scales and zero points; others get 8 bits, symmetric with
a scale per row. Embeddings are stored as integers and dequantized after the lookup.

O = output features, or rows of an embedding; I = input features; G = scales of a tensor.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import models
from distill.compress.quantizable import default_layers, shares_embedding_weight
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import RunFailed, UserError
from distill.packing.graph import GraphOptions, LogitsModule
from distill.packing.torchao import PER_TOKEN
from distill.recipe import capabilities
from distill.remote_code.modeling import ActivationQuantConv1D, CompressionConfig, quantize_input

FORMAT, FILE = "executorch", "model.pte"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # in the order of the program
MAX_BATCH = 32  # texts that memory is planned for; fewer where their logits exceed the next limit
MAX_LOGITS_BYTES = 256 << 20
INT8_ROWS = QuantSpec()  # for weights that training did not quantize


def save(model: PreTrainedModel, options: GraphOptions, target: Path) -> bool:
    """Write the program, whose inputs are positional, in the order of `INPUTS`.

    Args:
        model: changed in place.
        options: with `quantize`, weights become int8, and inputs of linear layers are quantized
            over the range of each token. Layers quantized in training stay quantized without it.
        target: the folder of the file.

    Returns:
        False: keys and values are neither inputs nor outputs.
    """
    model.eval().requires_grad_(False)
    _replace_conv1d(model)
    max_batch = _max_batch(model, options)
    quantize_layers(model, options.quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries use deprecated functions of each other
        _lower(model, options, max_batch).save(str(target / FILE))
    return False


def _replace_conv1d(model: PreTrainedModel) -> None:
    """Replace the transposed linear layers of GPT-2 by ordinary ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            linear = _make_linear(layer.weight.T.contiguous(), layer.bias)
            model.set_submodule(name, linear)
            if isinstance(layer, ActivationQuantConv1D):
                quantize_input(linear, layer.input_range)


def _make_linear(weight_OI: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


def quantize_layers(model: PreTrainedModel, quantize: str | None) -> None:
    """Replace weights by integers, if training quantized them or `quantize` is set.

    XNNPACK supports int8 weights with dynamically quantized inputs only: linear layers with other
    inputs stay in floats.
    """
    compression = CompressionConfig.from_config(model.config)
    dynamic = {name for name, ends in compression.activations.items() if ends is None}
    quantized = {name.removesuffix(".weight") for name in compression.weights}
    if quantize is not None:
        _check_dynamic({*compression.activations} - dynamic)
        modules = model.named_modules()
        tied = {name for name, layer in modules if shares_embedding_weight(model, layer)}
        quantized = dynamic = quantized | tied | {*default_layers(model)}
    for name in sorted(quantized):
        layer = model.get_submodule(name)
        fields = compression.weights.get(f"{name}.weight", INT8_ROWS.as_dict())
        spec = QuantSpec(**fields)
        if isinstance(layer, nn.Linear) and name in dynamic:
            weight = int8_weight(layer.weight, spec, name)
            model.set_submodule(name, _make_linear(weight, layer.bias))
        elif type(layer) is nn.Embedding:  # a subclass may compute more than a lookup
            model.set_submodule(name, LookupEmbedding(layer.weight, spec, name))


def _check_dynamic(static: set[str]) -> None:
    if static:
        raise UserError(
            f"export.format is {FORMAT}, but the inputs of {min(static)} are quantized to a fixed "
            "range, and XNNPACK supports the range of each token only: leave export.quantize out"
        )


def int8_weight(weight_OI: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """The weight of a linear layer as a tensor of torchao, in int8 also if it has fewer bits."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    capabilities.check_tensor(FORMAT, "dynamic", name, spec)
    rows, columns = weight_OI.shape
    qweight_OI, parts = quantize_weight(weight_OI, spec)
    return IntxUnpackedToInt8Tensor(
        (qweight_OI.short() - spec.quant_max // 2).to(torch.int8),
        expand_rows(parts["scale"], rows),
        torch.zeros(rows, 1, dtype=torch.int8),
        torch.int8,
        (1, columns),
        torch.float32,
        PER_TOKEN,
    )


def expand_rows(values_G: Tensor, rows: int) -> Tensor:
    """Scales or zero points as (rows, scales of a row); a value per tensor is repeated."""
    per_row = values_G.expand(rows) if len(values_G) == 1 else values_G
    return per_row.float().reshape(rows, -1).contiguous()


class LookupEmbedding(nn.Module):
    """Embedding with integer weights: (qweight - zero point) * scale.

    Weights of up to 4 bits are stored two per byte.
    """

    qweight: Tensor  # (O, I), or (O, I / 2)
    scale: Tensor  # (O, scales of a row)
    zero_point: Tensor | None  # same shape as scale; None: 0

    def __init__(self, weight_OI: Tensor, spec: QuantSpec, name: str) -> None:
        super().__init__()
        capabilities.check_embedding(FORMAT, name, spec)
        qweight_OI, parts = quantize_weight(weight_OI, spec)
        rows, scale_G, middle = len(weight_OI), parts["scale"], spec.quant_max // 2
        self.paired = spec.bits <= 4 and weight_OI.shape[1] % 2 == 0
        centered = spec.symmetric and not self.paired
        shift = 8 if self.paired else middle if centered else 128
        zero_G = parts.get("zero", torch.full_like(scale_G, middle)).float() - shift
        qweight = (
            qweight_OI[:, ::2] << 4 | qweight_OI[:, 1::2]
            if self.paired
            else (qweight_OI.short() - shift).to(torch.int8)
        )
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", expand_rows(scale_G, rows))
        self.register_buffer("zero_point", None if centered else expand_rows(zero_G, rows))

    def forward(self, input: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        look_up = operators.embedding_4bit if self.paired else operators.embedding_byte
        low = -8 if self.paired else -128
        return look_up(self.qweight, self.scale, self.zero_point, low, -low - 1, input)


def _lower(model: PreTrainedModel, options: GraphOptions, max_batch: int) -> Any:
    """Lower the model, for any number of texts and tokens up to those that memory is planned for.

    Raises:
        RunFailed: if the model has an operator that ExecuTorch does not support.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.passes import (
        _quant_patterns_and_replacements,  # noqa: F401  # registers the operators of embeddings
    )

    names, inputs = _example_inputs(options)
    dynamic = {
        0: torch.export.Dim("batch", min=1, max=max_batch),
        1: torch.export.Dim("tokens", min=1, max=options.max_length),
    }
    try:
        exported = torch.export.export(
            LogitsModule(model, names), inputs, dynamic_shapes=((dynamic,) * len(names),)
        )
        return to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ).to_executorch()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunFailed(
            f"export.format is {FORMAT}, but {type(model).__name__} cannot be lowered "
            f"({type(error).__name__}: {reason}): choose export.format=onnx or dense"
        ) from error


def _example_inputs(options: GraphOptions) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names of the inputs, and an example of each, with values that are not all equal."""
    names = [name for name in INPUTS if name in options.inputs]
    example = torch.ones(2, min(8, options.max_length), dtype=torch.long).tril(1)
    return names, tuple(example.clone() for _ in names)


@torch.no_grad()
def _max_batch(model: PreTrainedModel, options: GraphOptions) -> int:
    """The largest number of texts in a batch; smaller if the model returns logits per token."""
    names, inputs = _example_inputs(options)
    logits = models.logits(model, dict(zip(names, inputs, strict=True)))
    per_text = logits.shape[-1] * (options.max_length if logits.dim() == 3 else 1)
    return max(2, min(MAX_BATCH, MAX_LOGITS_BYTES // (4 * per_text)))
