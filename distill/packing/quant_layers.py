"""Layers that compute with int8 codes and no weights in float: what a graph of ONNX is made of.

The codes and scales are our own, those of a quantizer's grid: what they stand for is bit for bit what was trained. Linear layers
become operators of ONNX here, which torch cannot run: they are there to be exported.

O = output features, V = rows of an embedding, I = input features, G = grids of a row.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compress.fake_quant import modules_sharing
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import UserError
from distill.remote_code.modeling import LINEAR, fake_quantize_per_token

SYMMETRIC = 127  # the code of 0 on a symmetric grid
# The attribute of a rounding says nothing where there is one scale; but roundings that differ are not merged into one. Query, key and value
# round the same input, and ONNX Runtime computes with integers only where a rounding is read by one layer.
AXES = (0, 1, -1, -2)
LEAST = torch.finfo(torch.float32).smallest_normal
Inputs = Mapping[
    str, dict[str, Any]
]  # name of a linear layer -> how its input is rounded; see `rounding`


def replace_layers(
    student: PreTrainedModel, weights: Mapping[str, dict[str, Any]], inputs: Inputs, format: str
) -> None:
    """Put a layer of codes in the place of each that holds one of these tensors, whose weights are on the grids described."""
    names = {id(module): name for name, module in student.named_modules()}
    axes = itertools.cycle(AXES)
    for tensor, described in weights.items():
        layers, spec = modules_sharing(student, tensor), QuantSpec(**described)
        check(tensor, layers, spec, format)
        tied: Tensor | None = None
        for layer in layers:
            name, made = (
                names[id(layer)],
                _coded(layer, spec, inputs.get(names[id(layer)]), next(axes), rows=len(layers) > 1),
            )
            if tied is not None:
                made.codes = tied
            tied = made.codes
            student.set_submodule(name, made)


def _coded(
    layer: nn.Module, spec: QuantSpec, rounded: dict[str, Any] | None, axis: int, rows: bool
) -> "QuantEmbedding | QuantLinear":
    return (
        QuantEmbedding(layer, spec)
        if isinstance(layer, nn.Embedding)
        else QuantLinear(layer, spec, rounded, axis, rows)
    )


def check(tensor: str, layers: list[nn.Module], spec: QuantSpec, format: str) -> None:
    """UserError where the layers cannot compute with such codes; what an embedding looks up may have any linear ones."""
    way_out = "set export.format=packed or dense"
    if spec.method != "linear":
        raise UserError(
            f"export.format is {format}, but {tensor} is quantized with {spec.method}, which it cannot look up: {way_out}"
        )
    if all(isinstance(layer, nn.Embedding) for layer in layers):
        return
    if spec.bits != 8 or not spec.symmetric or spec.group > 0:
        how = f"{spec.bits} bits, {'a symmetric' if spec.symmetric else 'an affine'} grid" + (
            " for each group" if spec.group > 0 else ""
        )
        rule = "integer arithmetic takes 8 bits on a symmetric one for each row or tensor"
        raise UserError(f"export.format is {format}, but {tensor} has {how}, and {rule}: {way_out}")


class QuantEmbedding(nn.Module):
    """Looks up codes and scales: (code - zero) * scale. Of up to 4 bits a byte holds two: of a row's first half and of its second."""

    codes: Tensor  # (V, I), or (V, I / 2)
    scale: Tensor  # (V, G), or (1,) for the whole table
    zero: Tensor | None  # as the scale; null: 0

    def __init__(self, table: nn.Embedding, spec: QuantSpec) -> None:
        super().__init__()
        codes_VI, parts = quantize_weight(table.weight, spec)
        self.paired = spec.bits <= 4 and codes_VI.shape[1] % 2 == 0
        if self.paired:
            first, second = codes_VI.chunk(2, 1)
            codes_VI = first | second << 4
        elif spec.symmetric:
            codes_VI = (codes_VI.short() - (spec.levels // 2)).to(torch.int8)
        self.register_buffer("codes", codes_VI)
        self.register_buffer(
            "scale", parts["scale"].view((1,) if spec.group == -1 else (len(codes_VI), -1))
        )
        zero = parts.get(
            "zero",
            torch.full_like(parts["scale"], spec.levels // 2, dtype=torch.uint8)
            if self.paired
            else None,
        )
        self.register_buffer("zero", None if zero is None else zero.view(self.scale.shape))

    def forward(self, input_ids: Tensor) -> Tensor:
        quantize_weight = F.embedding(input_ids, self.codes).float()
        if self.paired:
            second = torch.floor(quantize_weight / 16)
            quantize_weight = torch.cat([quantize_weight - 16 * second, second], -1)
        of_group = quantize_weight.unflatten(
            -1, (1 if self.scale.dim() == 1 else self.scale.shape[1], -1)
        )
        if self.zero is not None:
            of_group = of_group - self._of_rows(self.zero, input_ids)
        return (of_group * self._of_rows(self.scale, input_ids)).flatten(-2)

    def _of_rows(self, values: Tensor, input_ids: Tensor) -> Tensor:
        return (values if values.dim() == 1 else F.embedding(input_ids, values)).float()[..., None]


class QuantLinear(nn.Module):
    """A linear layer on int8 weights, a scale for each output; see :func:`rounding` for its input.

    `rows`: the codes are those of an embedding as well, and lie as it reads them, (O, I).
    """

    codes: Tensor  # (I, O)
    scale: Tensor  # (O,)
    zero: Tensor  # (O,), all 0
    input_scale: Tensor  # of a range that is known
    input_zero: Tensor

    def __init__(
        self,
        layer: nn.Module,
        spec: QuantSpec,
        rounded: dict[str, Any] | None,
        axis: int = 0,
        rows: bool = False,
    ) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        codes_OI, parts = quantize_weight(weight.T if isinstance(layer, Conv1D) else weight, spec)
        integers_OI = (codes_OI.short() - SYMMETRIC).to(torch.int8)
        self.rows = rows
        self.register_buffer("codes", integers_OI if rows else integers_OI.T.contiguous())
        self.register_buffer("scale", parts["scale"].float().expand(len(codes_OI)).contiguous())
        self.register_buffer("zero", torch.zeros(len(codes_OI), dtype=torch.int8))
        self.bias, self.rounded, self.axis = layer._parameters["bias"], rounded, axis
        if rounded is not None and rounded["how"] == "static":
            self.register_buffer("input_scale", torch.tensor(rounded["scale"]))
            self.register_buffer(
                "input_zero", torch.tensor(rounded["zero"], dtype=getattr(torch, rounded["dtype"]))
            )

    def forward(self, input: Tensor) -> Tensor:
        how = None if self.rounded is None else self.rounded["how"]
        product = (
            self._integers(input) if how == "dynamic" else self._floats(self._rounded(input, how))
        )
        return product if self.bias is None else product + self.bias

    def _rounded(self, input: Tensor, how: str | None) -> Tensor:
        if how == "token":
            return fake_quantize_per_token(input)
        if how is None:
            return input
        grid = (self.input_scale, self.input_zero)
        integers = symbolic(
            "QuantizeLinear",
            (input, *grid),
            {"axis": self.axis},
            dtype=self.input_zero.dtype,
            shape=input.shape,
        )
        return symbolic(
            "DequantizeLinear",
            (integers, *grid),
            {"axis": self.axis},
            dtype=torch.float32,
            shape=input.shape,
        )

    def _floats(self, input: Tensor) -> Tensor:
        inputs, axis = (self.codes, self.scale, self.zero), 0 if self.rows else 1
        weight = symbolic(
            "DequantizeLinear", inputs, {"axis": axis}, dtype=torch.float32, shape=self.codes.shape
        )
        return input @ (weight.T if self.rows else weight)

    def _integers(self, input: Tensor) -> Tensor:
        """The input on the affine grid that spans the whole batch: the pattern that runtimes know as one operator."""
        kinds = (torch.uint8, torch.float32, torch.uint8)
        shapes = (input.shape, (), ())
        integers, scale, zero = symbolic_multi_out(
            "DynamicQuantizeLinear", (input,), dtypes=kinds, shapes=shapes
        )
        shape = (*input.shape[:-1], self.codes.shape[1])
        sums = symbolic(
            "MatMulInteger", (integers, self.codes, zero, self.zero), dtype=torch.int32, shape=shape
        )
        return sums.float() * (scale * self.scale)


def input_quantization(how: str | None, span: list[float] | None, trained: bool) -> dict[str, Any]:
    """How a layer's input is rounded to 8 bits: over the batch (dynamic), each token, or a range that is known (static).

    A trained range keeps its own affine grid, bit for bit; one that was found by calibration gets a grid that is symmetric, as TensorRT
    has it.
    """
    if span is None:
        return {"how": how}
    low, high = (torch.tensor(edge) for edge in span)
    if not trained:
        scale = torch.maximum(-low, high).clamp(min=LEAST) / SYMMETRIC
        return {"how": "static", "scale": float(scale), "zero": 0, "dtype": "int8"}
    scale = ((high.clamp(min=0) - low.clamp(max=0)) / 255.0).clamp(min=LEAST)  # as round_to_range
    return {
        "how": "static",
        "scale": float(scale),
        "zero": int(torch.round(-low.clamp(max=0) / scale).clamp(0, 255)),
        "dtype": "uint8",
    }


def linear_layers(student: PreTrainedModel, weights: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Those whose input may be rounded: not an output layer that shares its weight with the embeddings."""
    table = student.get_input_embeddings().weight
    found = {
        tensor.removesuffix(".weight"): student.get_submodule(tensor.removesuffix(".weight"))
        for tensor in weights
    }
    return {
        name: layer
        for name, layer in found.items()
        if isinstance(layer, LINEAR) and layer.weight is not table
    }
