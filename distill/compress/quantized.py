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
from distill.compress.quantize import Spec, quantized
from distill.errors import RunFailed, UserError
from distill.runtime.modeling import RoundedConv1D, RoundedLinear, StraightThrough, round_input, round_per_token, round_to_range


class Quantized(nn.Module):
    """What the three kinds of layers below have in common; see :func:`attach`."""

    spec: Spec | None  # null: only the input is rounded
    keeps_zeros: bool  # of a sparse tensor, in a codebook
    rounds: str | None  # inputs: dynamic, static
    centroids: Tensor | None  # (G, K), a buffer
    input_range: Tensor | None  # (2,), a buffer; both 0 as long as it is not known

    def rows(self) -> Tensor:
        """The latent weight as (O, I)."""
        return self.get_parameter("weight")

    def value(self) -> Tensor:
        """The quantized weight as (O, I), in float32 whatever autocast says."""
        assert self.spec is not None
        return quantized(self.rows(), self.spec, self.keeps_zeros, self.centroids)

    def quantized_weight(self) -> Tensor:
        """The same, in the weight's own layout, with a gradient for the latent weight."""
        weight = self.get_parameter("weight")
        return weight if self.spec is None else StraightThrough.apply(weight, self.value())

    def rounded(self, input: Tensor) -> Tensor:
        if self.rounds is None:
            return input
        if self.input_range is None:
            return round_per_token(input)
        own_2 = torch.stack([input.detach().amin(), input.detach().amax()]).float()
        return round_to_range(input, torch.where(self.input_range.any(), self.input_range, own_2))


class QuantizedLinear(Quantized, nn.Linear):
    """nn.Linear with a quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.rounded(input), self.quantized_weight(), self.bias)


class QuantizedConv1D(Quantized, Conv1D):
    """GPT-2's linear layer, whose weight is (I, O), with a quantized one."""

    def rows(self) -> Tensor:
        return self.weight.T

    def quantized_weight(self) -> Tensor:
        return self.weight if self.spec is None else StraightThrough.apply(self.weight, self.value().T.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        rows = self.rounded(input).view(-1, input.shape[-1])
        return torch.addmm(self.bias, rows, self.quantized_weight()).view(*input.shape[:-1], self.nf)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """nn.Embedding of which only the rows that are looked up are quantized: to what they are in the whole quantized table."""

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, input)
        assert self.spec is not None
        centroids = self.centroids
        if centroids is not None and len(centroids) > 1:
            centroids = centroids.view(self.num_embeddings, -1, centroids.shape[-1])[input.flatten()].flatten(0, 1)
        value_NI = quantized(rows.flatten(0, -2), self.spec, self.keeps_zeros, centroids, whole_OI=self.weight)
        return StraightThrough.apply(rows, value_NI.view(rows.shape))


CLASSES: dict[type, type[Quantized]] = {
    nn.Linear: QuantizedLinear,
    RoundedLinear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
    RoundedConv1D: QuantizedConv1D,
    nn.Embedding: QuantizedEmbedding,
}
PLAIN: dict[type, type[nn.Module]] = {QuantizedLinear: nn.Linear, QuantizedConv1D: Conv1D, QuantizedEmbedding: nn.Embedding}


def attach(
    student: PreTrainedModel, weights: Mapping[str, dict[str, Any]], activations: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Quantize these tensors, and round the inputs of these modules, at every forward; both as `config.compression` describes them.

    A tensor that several modules share is quantized in all of them. Codebooks and ranges are buffers: to be loaded, or to be
    found by :func:`fit_codebooks` and :func:`set_ranges`.
    """
    for name, described in weights.items():
        for module in holders(student, name):
            layer = changed(module, name)
            layer.spec = Spec(**described)
            if layer.spec.method == "codebook":
                groups = len(layer.spec.grouped(layer.rows()))
                layer.centroids = layer.rows().new_zeros(groups, 2**layer.spec.bits, dtype=torch.float32)
    for name, rounded in (activations or {}).items():
        layer = changed(student.get_submodule(name), name)
        layer.rounds = "dynamic" if rounded["range"] is None else "static"
        if rounded["range"] is not None:
            layer.input_range = torch.tensor(rounded["range"], dtype=torch.float32, device=layer.rows().device)


def changed(module: nn.Module, name: str) -> Quantized:
    """The same module, in the class that quantizes."""
    if isinstance(module, Quantized):
        return module
    if type(module) not in CLASSES:
        raise UserError(
            f"{name} belongs to a {type(module).__name__}, but only plain linear layers and embeddings are quantized: leave it out"
        )
    vars(module).pop("input_range", None)  # of a layer whose input was rounded already
    module.__class__ = CLASSES[type(module)]
    assert isinstance(module, Quantized)
    module.spec, module.keeps_zeros, module.rounds = None, False, None
    module.register_buffer("centroids", None)
    module.register_buffer("input_range", None)
    return module


def holders(student: nn.Module, name: str) -> list[nn.Module]:
    """All modules that have this tensor as their weight."""
    parameter = student.get_parameter(name)
    return [module for module in student.modules() if module._parameters.get("weight") is parameter]


def layers(student: nn.Module) -> Iterator[tuple[str, Quantized]]:
    return ((name, module) for name, module in student.named_modules() if isinstance(module, Quantized))


def mark_sparse(student: nn.Module, sparse: Iterable[str]) -> None:
    """The zeros of these tensors are not to be represented by a codebook."""
    pruned = {id(student.get_parameter(name)) for name in sparse}
    for _, layer in layers(student):
        layer.keeps_zeros |= id(layer._parameters["weight"]) in pruned


@torch.no_grad()
def fit_codebooks(student: nn.Module, weights: Iterable[str], refine: bool = False) -> None:
    """Find the codebooks of these tensors, anew or a few iterations further on; others are left alone."""
    for name in weights:
        found: Tensor | None = None
        for layer in holders(student, name):
            assert isinstance(layer, Quantized) and layer.spec is not None
            if layer.centroids is None:
                continue
            if found is None:
                weight_GS = layer.spec.grouped(layer.rows().float())
                found = (
                    codebook.refined(weight_GS, layer.centroids, layer.keeps_zeros)
                    if refine
                    else codebook.centroids(weight_GS, layer.spec.bits, layer.keeps_zeros)
                )
            layer.centroids.copy_(found)


def set_ranges(student: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """What the inputs of these modules span, as [low, high]."""
    for name, range_2 in ranges.items():
        layer = student.get_submodule(name)
        assert isinstance(layer, Quantized) and layer.input_range is not None
        layer.input_range.copy_(range_2)


@torch.no_grad()
def fold(student: PreTrainedModel) -> None:
    """Write the quantized values into the weights, the ranges into `config.compression`, and make the layers ordinary ones again."""
    for name, layer in list(layers(student)):
        if layer.spec is not None:
            layer.rows().copy_(layer.value())
        rounds, input_range = layer.rounds, None if layer.input_range is None else layer.input_range.tolist()
        if input_range is not None:
            if not any(input_range):
                raise RunFailed(f"the inputs of {name} have no range, but it must be seen in training: let the quantization start later")
            student.config.compression["activations"][name]["range"] = input_range
        for attribute in ("spec", "keeps_zeros", "rounds", "centroids", "input_range"):
            delattr(layer, attribute)
        layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]
        if rounds is not None:
            round_input(layer, input_range)
