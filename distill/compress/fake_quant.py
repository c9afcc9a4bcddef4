"""Layers that compute with quantized weights and rounded inputs, while their latent weights train on.

A layer changes its class and stays the same object, with the same parameters, names and hooks. N = tokens, I = input features,
O = output features or rows of an embedding, G = groups that share a grid, K = 2^bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compress import codebook
from distill.compress.quantizer import QuantSpec, fake_quantize_weight
from distill.errors import RunFailed, UserError
from distill.remote_code.modeling import (
    ActivationQuantConv1D,
    ActivationQuantLinear,
    StraightThrough,
    fake_quantize_per_token,
    fake_quantize_to_range,
    quantize_input,
)


class FakeQuantLayer(nn.Module):
    """What the three kinds of layers below have in common; see :func:`attach`."""

    spec: QuantSpec | None  # null: only the input is rounded
    keep_zeros: bool  # of a sparse tensor, in a codebook
    rounds: str | None  # inputs: dynamic, static
    centroids: Tensor | None  # (G, K), a buffer
    input_range: Tensor | None  # (2,), a buffer; both 0 as long as it is not known

    def rows(self) -> Tensor:
        """The latent weight as (O, I)."""
        return self.get_parameter("weight")

    def value(self) -> Tensor:
        """The quantized weight as (O, I), in float32 whatever autocast says."""
        assert self.spec is not None
        return fake_quantize_weight(self.rows(), self.spec, self.keep_zeros, self.centroids)

    def quantized_weight(self) -> Tensor:
        """The same, in the weight's own layout, with a gradient for the latent weight."""
        weight = self.get_parameter("weight")
        return weight if self.spec is None else StraightThrough.apply(weight, self.value())

    def rounded(self, input: Tensor) -> Tensor:
        if self.rounds is None:
            return input
        if self.input_range is None:
            return fake_quantize_per_token(input)
        own_2 = torch.stack([input.detach().amin(), input.detach().amax()]).float()
        return fake_quantize_to_range(
            input, torch.where(self.input_range.any(), self.input_range, own_2)
        )


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """nn.Linear with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.rounded(input), self.quantized_weight(), self.bias)


class FakeQuantConv1D(FakeQuantLayer, Conv1D):
    """GPT-2's linear layer, whose weight is (I, O), with a quantized one."""

    def rows(self) -> Tensor:
        return self.weight.T

    def quantized_weight(self) -> Tensor:
        return (
            self.weight
            if self.spec is None
            else StraightThrough.apply(self.weight, self.value().T.contiguous())
        )

    def forward(self, input: Tensor) -> Tensor:
        rows = self.rounded(input).view(-1, input.shape[-1])
        return torch.addmm(self.bias, rows, self.quantized_weight()).view(
            *input.shape[:-1], self.nf
        )


class FakeQuantEmbedding(FakeQuantLayer, nn.Embedding):
    """nn.Embedding of which only the rows that are looked up are quantized: to what they are in the whole quantized table."""

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, input)
        assert self.spec is not None
        centroids = self.centroids
        if centroids is not None and len(centroids) > 1:
            centroids = centroids.view(self.num_embeddings, -1, centroids.shape[-1])[
                input.flatten()
            ].flatten(0, 1)
        value_NI = fake_quantize_weight(
            rows.flatten(0, -2), self.spec, self.keep_zeros, centroids, whole_OI=self.weight
        )
        return StraightThrough.apply(rows, value_NI.view(rows.shape))


CLASSES: dict[type, type[FakeQuantLayer]] = {
    nn.Linear: FakeQuantLinear,
    ActivationQuantLinear: FakeQuantLinear,
    Conv1D: FakeQuantConv1D,
    ActivationQuantConv1D: FakeQuantConv1D,
    nn.Embedding: FakeQuantEmbedding,
}
PLAIN: dict[type, type[nn.Module]] = {
    FakeQuantLinear: nn.Linear,
    FakeQuantConv1D: Conv1D,
    FakeQuantEmbedding: nn.Embedding,
}


def attach_fake_quant(
    student: PreTrainedModel,
    weights: Mapping[str, dict[str, Any]],
    activations: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Quantize these tensors, and round the inputs of these modules, at every forward; both as `config.compression` describes them.

    A tensor that several modules share is quantized in all of them. Codebooks and ranges are buffers: to be loaded, or to be
    found by :func:`fit_codebooks` and :func:`set_ranges`.
    """
    for name, described in weights.items():
        for module in modules_sharing(student, name):
            layer = to_fake_quant(module, name)
            layer.spec = QuantSpec(**described)
            if layer.spec.method == "codebook":
                groups = len(layer.spec.grouped(layer.rows()))
                layer.centroids = layer.rows().new_zeros(
                    groups, 2**layer.spec.bits, dtype=torch.float32
                )
    for name, rounded in (activations or {}).items():
        layer = to_fake_quant(student.get_submodule(name), name)
        layer.rounds = "dynamic" if rounded["range"] is None else "static"
        if rounded["range"] is not None:
            layer.input_range = torch.tensor(
                rounded["range"], dtype=torch.float32, device=layer.rows().device
            )


def to_fake_quant(module: nn.Module, name: str) -> FakeQuantLayer:
    """The same module, in the class that quantizes."""
    if isinstance(module, FakeQuantLayer):
        return module
    if type(module) not in CLASSES:
        raise UserError(
            f"{name} belongs to a {type(module).__name__}, but only plain linear layers and embeddings are quantized: leave it out"
        )
    vars(module).pop("input_range", None)  # of a layer whose input was rounded already
    module.__class__ = CLASSES[type(module)]
    assert isinstance(module, FakeQuantLayer)
    module.spec, module.keep_zeros, module.rounds = None, False, None
    module.register_buffer("centroids", None)
    module.register_buffer("input_range", None)
    return module


def modules_sharing(student: nn.Module, name: str) -> list[nn.Module]:
    """All modules that have this tensor as their weight."""
    parameter = student.get_parameter(name)
    return [module for module in student.modules() if module._parameters.get("weight") is parameter]


def fake_quant_layers(student: nn.Module) -> Iterator[tuple[str, FakeQuantLayer]]:
    return (
        (name, module)
        for name, module in student.named_modules()
        if isinstance(module, FakeQuantLayer)
    )


def mark_sparse(student: nn.Module, sparse: Iterable[str]) -> None:
    """The zeros of these tensors are not to be represented by a codebook."""
    pruned = {id(student.get_parameter(name)) for name in sparse}
    for _, layer in fake_quant_layers(student):
        layer.keep_zeros |= id(layer._parameters["weight"]) in pruned


@torch.no_grad()
def fit_codebooks(student: nn.Module, weights: Iterable[str], refine: bool = False) -> None:
    """Find the codebooks of these tensors, anew or a few iterations further on; others are left alone."""
    for name in weights:
        found: Tensor | None = None
        for layer in modules_sharing(student, name):
            assert isinstance(layer, FakeQuantLayer) and layer.spec is not None
            if layer.centroids is None:
                continue
            if found is None:
                weight_GS = layer.spec.grouped(layer.rows().float())
                found = (
                    codebook.refine_centroids(weight_GS, layer.centroids, layer.keep_zeros)
                    if refine
                    else codebook.fit_centroids(weight_GS, layer.spec.bits, layer.keep_zeros)
                )
            layer.centroids.copy_(found)


def set_ranges(student: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """What the inputs of these modules span, as [low, high]."""
    for name, range_2 in ranges.items():
        layer = student.get_submodule(name)
        assert isinstance(layer, FakeQuantLayer) and layer.input_range is not None
        layer.input_range.copy_(range_2)


@torch.no_grad()
def fold_fake_quant(student: PreTrainedModel) -> None:
    """Write the quantized values into the weights, the ranges into `config.compression`, and make the layers ordinary ones again."""
    for name, layer in list(fake_quant_layers(student)):
        if layer.spec is not None:
            layer.rows().copy_(layer.value())
        rounds, input_range = (
            layer.rounds,
            None if layer.input_range is None else layer.input_range.tolist(),
        )
        if input_range is not None:
            if not any(input_range):
                raise RunFailed(
                    f"the inputs of {name} have no range, but it must be seen in training: let the quantization start later"
                )
            student.config.compression["activations"][name]["range"] = input_range
        for attribute in ("spec", "keep_zeros", "rounds", "centroids", "input_range"):
            delattr(layer, attribute)
        layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]
        if rounds is not None:
            quantize_input(layer, input_range)
