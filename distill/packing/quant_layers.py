"""Layers with quantized weights, from which an ONNX graph is traced.

Weights, scales and zero points are those of the quantizer, so that they equal the trained values
bit for bit. Linear layers use ONNX operators, which torch cannot run.

O = output features, V = rows of an embedding, I = input features, G = scales of a row.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import internals
from distill.compress.fake_quant import modules_sharing
from distill.compress.quantizable import activation_layers
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.packing.graph import check_quantized
from distill.remote_code.modeling import fake_quantize_per_token

SYMMETRIC = 127  # the quantizer's integer that stands for 0 where it is symmetric
SMALLEST = torch.finfo(torch.float32).smallest_normal
# With a single scale the attribute `axis` has no effect, but operators with different axes are not
# merged. Query, key and value quantize the same input, and ONNX Runtime computes with integers only
# if a quantized input has one consumer.
AXES = (0, 1, -1, -2)


@dataclass(frozen=True)
class InputQuantization:
    """How the input of a linear layer is quantized to 8 bits.

    Args:
        mode: ``token``: over each token's range, as in training; ``dynamic``: over the batch;
            ``static``: over a fixed range.
        scale: scale of a fixed range.
        zero_point: zero point of a fixed range.
        dtype: name of the integer type of a fixed range.
    """

    mode: str
    scale: float = 1.0
    zero_point: int = 0
    dtype: str = "int8"


def symmetric_range(low: float, high: float) -> InputQuantization:
    """The quantization of a range from calibration: symmetric, as TensorRT needs it."""
    largest = torch.maximum(-torch.tensor(low), torch.tensor(high))
    return InputQuantization("static", float(largest.clamp(min=SMALLEST) / SYMMETRIC))


def trained_range(low: float, high: float) -> InputQuantization:
    """The quantization of a range from training, with the same scale and zero point."""
    lowest, highest = torch.tensor(low).clamp(max=0), torch.tensor(high).clamp(min=0)
    scale = ((highest - lowest) / 255.0).clamp(min=SMALLEST)
    zero_point = int(torch.round(-lowest / scale).clamp(0, 255))
    return InputQuantization("static", float(scale), zero_point, "uint8")


def linear_layers(student: PreTrainedModel, weights: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The linear layers with these weights, except a head that is tied to the embeddings."""
    names = [tensor.removesuffix(".weight") for tensor in weights]
    return activation_layers(student, {name: student.get_submodule(name) for name in names})


def replace_layers(
    student: PreTrainedModel,
    weights: Mapping[str, dict[str, Any]],
    inputs: Mapping[str, InputQuantization],
    format: str,
) -> None:
    """Replace each layer that holds one of the quantized weights.

    Args:
        student: changed in place.
        weights: names of quantized weights, and the fields of their `QuantSpec`.
        inputs: quantization of the inputs of linear layers, by the layer's name.
        format: `export.format`, for the error if it does not support a weight.
    """
    names = {id(module): name for name, module in student.named_modules()}
    axes = itertools.cycle(AXES)
    for tensor, fields in weights.items():
        layers, spec = modules_sharing(student, tensor), QuantSpec(**fields)
        check_quantized(format, tensor, layers, spec)
        tied = len(layers) > 1
        qweight: Tensor | None = None
        for layer in layers:
            name, axis = names[id(layer)], next(axes)
            replacement = (
                QuantEmbedding(layer, spec)
                if isinstance(layer, nn.Embedding)
                else QuantLinear(layer, spec, inputs.get(name), axis, tied)
            )
            if qweight is not None:
                replacement.qweight = qweight
            qweight = replacement.qweight
            student.set_submodule(name, replacement)


class QuantEmbedding(nn.Module):
    """Embedding with quantized weights: (qweight - zero point) * scale.

    With up to 4 bits a byte holds two weights: one of a row's first half and one of its second.
    """

    qweight: Tensor  # (V, I), or (V, I / 2)
    scale: Tensor  # (V, G), or (1,) for the table
    zero_point: Tensor | None  # same shape as scale; None: 0

    def __init__(self, table: nn.Embedding, spec: QuantSpec) -> None:
        super().__init__()
        qweight_VI, parts = quantize_weight(table.weight, spec)
        self.paired = spec.bits <= 4 and qweight_VI.shape[1] % 2 == 0
        if self.paired:
            first, second = qweight_VI.chunk(2, 1)
            qweight_VI = first | second << 4
        elif spec.symmetric:
            qweight_VI = (qweight_VI.short() - (spec.quant_max // 2)).to(torch.int8)
        scale = parts["scale"]
        self.register_buffer("qweight", qweight_VI)
        self.register_buffer(
            "scale", scale.view((1,) if spec.group == -1 else (len(qweight_VI), -1))
        )
        middle = torch.full_like(scale, spec.quant_max // 2, dtype=torch.uint8)
        zero_point = parts.get("zero", middle if self.paired else None)
        self.register_buffer(
            "zero_point", None if zero_point is None else zero_point.view(self.scale.shape)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        weight = F.embedding(input_ids, self.qweight).float()
        if self.paired:
            second = torch.floor(weight / 16)
            weight = torch.cat([weight - 16 * second, second], -1)
        groups = 1 if self.scale.dim() == 1 else self.scale.shape[1]
        weight = weight.unflatten(-1, (groups, -1))
        if self.zero_point is not None:
            weight = weight - self._per_row(self.zero_point, input_ids)
        return (weight * self._per_row(self.scale, input_ids)).flatten(-2)

    def _per_row(self, values: Tensor, input_ids: Tensor) -> Tensor:
        return (values if values.dim() == 1 else F.embedding(input_ids, values)).float()[..., None]


class QuantLinear(nn.Module):
    """A linear layer with int8 weights and a scale for each output.

    Args:
        layer: `nn.Linear` or `Conv1D`.
        spec: how its weight is quantized.
        input_quantization: how its input is quantized; None: not quantized.
        axis: the attribute of the operators that quantize its input; see `AXES`.
        tied: whether an embedding shares the weight, which then has the embedding's layout.
    """

    qweight: Tensor  # (I, O); tied: (O, I)
    scale: Tensor  # (O,)
    zero_point: Tensor  # (O,), all 0
    input_scale: Tensor  # of a fixed range
    input_zero_point: Tensor

    def __init__(
        self,
        layer: nn.Module,
        spec: QuantSpec,
        input_quantization: InputQuantization | None,
        axis: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        weight_OI = weight.T if isinstance(layer, Conv1D) else weight
        qweight_OI, parts = quantize_weight(weight_OI, spec)
        qweight_OI = (qweight_OI.short() - SYMMETRIC).to(torch.int8)
        outputs = len(qweight_OI)
        self.register_buffer("qweight", qweight_OI if tied else qweight_OI.T.contiguous())
        self.register_buffer("scale", parts["scale"].float().expand(outputs).contiguous())
        self.register_buffer("zero_point", torch.zeros(outputs, dtype=torch.int8))
        self.bias = internals.stored_parameter(layer, "bias")
        self.mode = input_quantization.mode if input_quantization else None
        self.axis, self.tied = axis, tied
        if input_quantization is not None and self.mode == "static":
            dtype = getattr(torch, input_quantization.dtype)
            zero_point = torch.tensor(input_quantization.zero_point, dtype=dtype)
            self.register_buffer("input_scale", torch.tensor(input_quantization.scale))
            self.register_buffer("input_zero_point", zero_point)

    def forward(self, input: Tensor) -> Tensor:
        product = (
            self._integer_product(input)
            if self.mode == "dynamic"
            else self._float_product(self._quantized_input(input))
        )
        return product if self.bias is None else product + self.bias

    def _quantized_input(self, input: Tensor) -> Tensor:
        """The input, fake-quantized to 8 bits."""
        if self.mode == "token":
            return fake_quantize_per_token(input)
        if self.mode is None:
            return input
        parameters = (self.input_scale, self.input_zero_point)
        axis: dict[str, Any] = {"axis": self.axis}
        dtype, shape = self.input_zero_point.dtype, input.shape
        integers = symbolic("QuantizeLinear", (input, *parameters), axis, dtype=dtype, shape=shape)
        return symbolic(
            "DequantizeLinear", (integers, *parameters), axis, dtype=torch.float32, shape=shape
        )

    def _float_product(self, input: Tensor) -> Tensor:
        inputs, axis = (self.qweight, self.scale, self.zero_point), 0 if self.tied else 1
        weight = symbolic(
            "DequantizeLinear",
            inputs,
            {"axis": axis},
            dtype=torch.float32,
            shape=self.qweight.shape,
        )
        return input @ (weight.T if self.tied else weight)

    def _integer_product(self, input: Tensor) -> Tensor:
        """The pattern that runtimes fuse: the input quantized over the range of the batch."""
        integers, scale, zero_point = symbolic_multi_out(
            "DynamicQuantizeLinear",
            (input,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(input.shape, (), ()),
        )
        shape = (*input.shape[:-1], self.qweight.shape[1])
        factors = (integers, self.qweight, zero_point, self.zero_point)
        sums = symbolic("MatMulInteger", factors, dtype=torch.int32, shape=shape)
        return sums.float() * (scale * self.scale)
