"""Layers that quantize their weights and inputs while they train (fake quantization).

A layer changes its class and stays the same object, with the same parameters, names and hooks. Its
weight stays in floating point: the latent weight, to which gradients go straight through.

Shapes: N = tokens, I = input features, O = output features or rows of an embedding, G = groups that
share a codebook, K = 2^bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import internals
from distill.compress import codebook
from distill.compress.quantizable import computes_linear
from distill.compress.quantizer import QuantSpec, fake_quantize_weight
from distill.errors import RunFailed, UserError
from distill.remote_code.modeling import (
    ActivationQuantConv1D,
    ActivationQuantLinear,
    CompressionConfig,
    StraightThrough,
    fake_quantize_per_token,
    fake_quantize_to_range,
    quantize_input,
)

__all__ = [
    "FakeQuantConv1D",
    "FakeQuantEmbedding",
    "FakeQuantLayer",
    "FakeQuantLinear",
    "attach_fake_quant",
    "fake_quant_layers",
    "fit_codebooks",
    "fold_fake_quant",
    "mark_sparse",
    "modules_sharing",
    "set_ranges",
]


class FakeQuantLayer(nn.Module):
    """Base of the three classes below. Layers become instances in :func:`attach_fake_quant`.

    Attributes:
        spec: how the weight is quantized; None if only the inputs are.
        keep_zeros: whether the weight is sparse, so that its codebook excludes zeros.
        activations: how inputs are quantized: None, ``dynamic`` or ``static``.
        centroids: (G, K), a buffer: the codebooks.
        input_range: (2,), a buffer: [lowest, highest] input, both 0 before the first batch.
    """

    spec: QuantSpec | None
    keep_zeros: bool
    activations: str | None
    centroids: Tensor | None
    input_range: Tensor | None

    def weight_rows(self) -> Tensor:
        """The latent weight, (O, I)."""
        return self.get_parameter("weight")

    def quantized_rows(self) -> Tensor:
        """The values of the quantized weight, (O, I), in float32 under autocast as well."""
        assert self.spec is not None
        return fake_quantize_weight(self.weight_rows(), self.spec, self.keep_zeros, self.centroids)

    def quantized_weight(self) -> Tensor:
        """The quantized values in the layout of `weight`, with a straight-through gradient."""
        weight = self.get_parameter("weight")
        return weight if self.spec is None else StraightThrough.apply(weight, self.quantized_rows())

    def quantized_input(self, input: Tensor) -> Tensor:
        """The input, quantized to 8 bits if the layer quantizes its inputs."""
        if self.activations is None:
            return input
        if self.input_range is None:
            return fake_quantize_per_token(input)
        batch_range_2 = torch.stack([input.detach().amin(), input.detach().amax()]).float()
        known = self.input_range.any()
        return fake_quantize_to_range(input, torch.where(known, self.input_range, batch_range_2))


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """nn.Linear with fake quantization."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class FakeQuantConv1D(FakeQuantLayer, Conv1D):
    """transformers' Conv1D, whose weight is (I, O), with fake quantization."""

    def weight_rows(self) -> Tensor:
        return self.weight.T

    def quantized_weight(self) -> Tensor:
        if self.spec is None:
            return self.weight
        return StraightThrough.apply(self.weight, self.quantized_rows().T.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        input_NI = self.quantized_input(input).view(-1, input.shape[-1])
        output_NO = torch.addmm(self.bias, input_NI, self.quantized_weight())
        return output_NO.view(*input.shape[:-1], self.nf)


class FakeQuantEmbedding(FakeQuantLayer, nn.Embedding):
    """nn.Embedding with fake quantization.

    Only the rows that are looked up are quantized, to the values that they have in the quantized
    embedding.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, input)
        assert self.spec is not None
        centroids_GK = self.centroids
        if centroids_GK is not None and len(centroids_GK) > 1:
            of_rows = centroids_GK.view(self.num_embeddings, -1, centroids_GK.shape[-1])
            centroids_GK = of_rows[input.flatten()].flatten(0, 1)
        rows_NI = rows.flatten(0, -2)
        value_NI = fake_quantize_weight(
            rows_NI, self.spec, self.keep_zeros, centroids_GK, table_OI=self.weight
        )
        return StraightThrough.apply(rows, value_NI.view(rows.shape))


_FAKE_QUANT_CLASSES: dict[type, type[FakeQuantLayer]] = {
    nn.Linear: FakeQuantLinear,
    ActivationQuantLinear: FakeQuantLinear,
    Conv1D: FakeQuantConv1D,
    ActivationQuantConv1D: FakeQuantConv1D,
    nn.Embedding: FakeQuantEmbedding,
}
_PLAIN_CLASSES: dict[type, type[nn.Module]] = {
    FakeQuantLinear: nn.Linear,
    FakeQuantConv1D: Conv1D,
    FakeQuantEmbedding: nn.Embedding,
}


def attach_fake_quant(
    student: PreTrainedModel,
    weights: Mapping[str, dict[str, Any]],
    activations: Mapping[str, list[float] | None] | None = None,
) -> None:
    """Quantize tensors, and inputs of layers, in every forward pass from now on.

    A tensor that several modules share is quantized in all of them. Codebooks and ranges are
    buffers: load them, or compute them with :func:`fit_codebooks` and :func:`set_ranges`.

    Args:
        student: changed in place.
        weights: name of the tensor -> its `QuantSpec`, as in `CompressionConfig.weights`.
        activations: name of the layer -> input range, as in `CompressionConfig.activations`.

    Raises:
        UserError: if a tensor belongs to a module that cannot be quantized.
    """
    for name, spec in weights.items():
        for module in modules_sharing(student, name):
            layer = _to_fake_quant(module, name)
            layer.spec = QuantSpec(**spec)
            if layer.spec.method == "codebook":
                weight_OI = layer.weight_rows()
                shape = (len(layer.spec.grouped(weight_OI)), 2**layer.spec.bits)
                layer.centroids = weight_OI.new_zeros(shape, dtype=torch.float32)
    for name, input_range in (activations or {}).items():
        layer = _to_fake_quant(student.get_submodule(name), name)
        layer.activations = "dynamic" if input_range is None else "static"
        if input_range is not None:
            device = layer.weight_rows().device
            layer.input_range = torch.tensor(input_range, dtype=torch.float32, device=device)


def _to_fake_quant(module: nn.Module, name: str) -> FakeQuantLayer:
    """The same module, as an instance of the class with fake quantization."""
    if isinstance(module, FakeQuantLayer):
        return module
    kind: Any = type(module)
    fake_quant = _FAKE_QUANT_CLASSES.get(kind) or _subclass(kind)
    if fake_quant is None:
        raise UserError(
            f"{name} belongs to a {type(module).__name__}, but only linear layers and embeddings "
            "are quantized: leave it out"
        )
    vars(module).pop("input_range", None)  # an attribute of ActivationQuantized, a buffer here
    module.__class__ = fake_quant
    assert isinstance(module, FakeQuantLayer)
    module.spec, module.keep_zeros, module.activations = None, False, None
    module.register_buffer("centroids", None)
    module.register_buffer("input_range", None)
    return module


@lru_cache
def _subclass(kind: type) -> type[FakeQuantLayer] | None:
    """A class for a model's own embedding (Gemma's), or linear layer that computes nn.Linear's."""
    if issubclass(kind, nn.Embedding):
        return type(f"FakeQuant{kind.__name__}", (kind, FakeQuantEmbedding), {"plain": kind})
    if issubclass(kind, nn.Linear) and computes_linear(kind):
        return type(f"FakeQuant{kind.__name__}", (FakeQuantLinear, kind), {"plain": kind})
    return None


def modules_sharing(student: nn.Module, name: str) -> list[nn.Module]:
    """All modules whose `weight` is the parameter of this name."""
    parameter = student.get_parameter(name)
    return [
        module
        for module in student.modules()
        if internals.stored_parameter(module, "weight") is parameter
    ]


def fake_quant_layers(student: nn.Module) -> Iterator[tuple[str, FakeQuantLayer]]:
    """(name, layer) of all layers with fake quantization."""
    for name, module in student.named_modules():
        if isinstance(module, FakeQuantLayer):
            yield name, module


def mark_sparse(student: nn.Module, sparse: Iterable[str]) -> None:
    """Exclude the zeros of these tensors from their codebooks."""
    pruned = {id(student.get_parameter(name)) for name in sparse}
    for _, layer in fake_quant_layers(student):
        layer.keep_zeros |= id(internals.stored_parameter(layer, "weight")) in pruned


@torch.no_grad()
def fit_codebooks(student: nn.Module, weights: Iterable[str], refine: bool = False) -> None:
    """Fit the codebooks of quantized tensors.

    Args:
        student: changed in place.
        weights: names of tensors; those without a codebook are skipped.
        refine: whether to start from the current codebooks and run a few iterations only.
    """
    for name in weights:
        fitted: Tensor | None = None
        for layer in modules_sharing(student, name):
            assert isinstance(layer, FakeQuantLayer) and layer.spec is not None
            if layer.centroids is None:
                continue
            if fitted is None:
                weight_GS = layer.spec.grouped(layer.weight_rows().float())
                fitted = (
                    codebook.refine_centroids(weight_GS, layer.centroids, layer.keep_zeros)
                    if refine
                    else codebook.fit_centroids(weight_GS, layer.spec.bits, layer.keep_zeros)
                )
            layer.centroids.copy_(fitted)


def set_ranges(student: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """Set the input ranges of layers: name -> [lowest, highest], (2,)."""
    for name, range_2 in ranges.items():
        layer = student.get_submodule(name)
        assert isinstance(layer, FakeQuantLayer) and layer.input_range is not None
        layer.input_range.copy_(range_2)


@torch.no_grad()
def fold_fake_quant(student: PreTrainedModel) -> None:
    """Replace latent weights by their quantized values, and the layers by ordinary ones.

    Input ranges are written to `config.compression`.

    Raises:
        RunFailed: if the input range of a layer is unknown, because it has processed no batch.
    """
    compression = CompressionConfig.from_config(student.config)
    for name, layer in list(fake_quant_layers(student)):
        if layer.spec is not None:
            layer.weight_rows().copy_(layer.quantized_rows())
        activations, input_range = layer.activations, None
        if layer.input_range is not None:
            input_range = layer.input_range.tolist()
            if not any(input_range):
                raise RunFailed(
                    f"the input range of {name} is unknown, but quantization needs one that was "
                    "observed in training: start the quantization later"
                )
            compression.activations[name] = input_range
        for attribute in ("spec", "keep_zeros", "activations", "centroids", "input_range"):
            delattr(layer, attribute)
        plain = _PLAIN_CLASSES.get(type(layer)) or type(layer).plain  # type: ignore[attr-defined]
        layer.__class__ = plain  # type: ignore[assignment]
        if activations is not None:
            quantize_input(layer, input_range)
    compression.write_to(student.config)
