"""The modules of a compressed model. This file needs torch and transformers only.

It is copied into every export that the config alone does not describe; see `container.py`.

Shapes: O = output features, or rows of an embedding; I = input features; G = groups of weights that
share a scale or a codebook; K = 2^bits; N = tokens; D = features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, "QLoRA", appendix E).
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
LINEAR = (nn.Linear, Conv1D)


@dataclass
class CompressionConfig:
    """The effects of compression on a model that the other keys of its config cannot describe.

    It is stored as `config.compression`.

    Example::

        compression = CompressionConfig.from_config(model.config)
        compression.low_rank["bert.pooler.dense"] = 8
        compression.write_to(model.config)
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Linear layers whose widths differ from the config: name -> [in_features, out_features]."""
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Numbers of heads that a forward reads from its module: name of the module -> values."""
    low_rank: dict[str, int] = field(default_factory=dict)
    """Linear layers stored as two factors: name of the layer -> rank."""
    activations: dict[str, list[float] | None] = field(default_factory=dict)
    """Linear layers with 8-bit inputs: name of the layer -> [lowest, highest], None: per token."""
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Quantized tensors: name of the tensor -> method, bits, symmetric, group (a `QuantSpec`)."""
    sparse: list[str] = field(default_factory=list)
    """Names of the tensors that were pruned weight by weight."""
    vocabulary: int | None = None
    """Size of the vocabulary before it was trimmed."""

    @classmethod
    def from_config(cls, config: Any) -> "CompressionConfig":
        """Read `config.compression`; empty where the config has none."""
        return cls.from_json(getattr(config, "compression", None))

    @classmethod
    def from_json(cls, described: Any) -> "CompressionConfig":
        """The inverse of :meth:`to_json`. None gives an empty one; unknown keys are ignored."""
        described = described or {}
        activations = described.get("activations", {}).items()
        return cls(
            shapes=dict(described.get("shapes", {})),
            attributes=dict(described.get("attributes", {})),
            low_rank=dict(described.get("low_rank", {})),
            activations={name: quantized["range"] for name, quantized in activations},
            weights=dict(described.get("weights", {})),
            sparse=list(described.get("sparse", [])),
            vocabulary=described.get("vocabulary"),
        )

    def to_json(self) -> dict[str, Any]:
        """The value of `config.compression`: a dictionary of those fields that are not empty."""
        described = {**vars(self), "activations": _activations_to_json(self.activations)}
        return {key: value for key, value in described.items() if value}

    def write_to(self, config: Any) -> None:
        """Store it in `config.compression`."""
        config.compression = self.to_json()

    @property
    def needs_code(self) -> bool:
        """Whether loading needs this file: transformers alone would build other modules."""
        return bool(self.shapes or self.low_rank or self.activations)


def _activations_to_json(activations: dict[str, list[float] | None]) -> dict[str, Any]:
    return {name: {"bits": 8, "range": input_range} for name, input_range in activations.items()}


class LowRank(nn.Module):
    """A linear layer as the product of two: y = second(first(x)).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank, bias: features between the two layers; whether the second has a bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, (O, I). GPT-2's weight initialization reads it."""
        return self.second.weight @ self.first.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input))


class StraightThrough(torch.autograd.Function):
    """Returns `value`, and passes its gradient on to `latent`, times the mask `inside` if any."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inside)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return (gradients[0] if inside is None else gradients[0] * inside), None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale.

    The gradient is 1 where nothing was clamped and 0 elsewhere, as in
    :func:`torch.fake_quantize_per_tensor_affine`.
    """
    with torch.no_grad():
        unclamped = torch.round(x / scale) + zero_point
        quantized = unclamped.clamp(quant_min, quant_max)
        value, inside = (quantized - zero_point) * scale, quantized == unclamped
    return StraightThrough.apply(x, value, inside)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Affine int8 quantization with the range of each token, in the dtype of `x`.

    Bit for bit the same as torchao's `int8_asym_per_token`.
    """
    with torch.no_grad():
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255.0).clamp(min=torch.finfo(x.dtype).smallest_normal)
        zero_point = (-128 - torch.round(low / scale)).clamp(-128, 127)
        quantized = (torch.round(x * (1.0 / scale)) + zero_point).clamp(-128, 127)
        value = (quantized - zero_point) * scale
    return StraightThrough.apply(x, value)


def fake_quantize_to_range(x: Tensor, range_2: Tensor) -> Tensor:
    """Affine uint8 quantization with one range [low, high], which is extended to include 0.

    Computed in float32 whatever the dtype of `x`.
    """
    low, high = range_2[0].clamp(max=0), range_2[1].clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero_point = torch.round(-low / scale).clamp(0, 255)
    return fake_quantize(x.float(), scale, zero_point, 0, 255).to(x.dtype)


class ActivationQuantized(nn.Module):
    """Mixin of linear layers whose input is quantized to 8 bits.

    `input_range` is [lowest, highest] input, or None for the range of each token.
    """

    input_range: Sequence[float] | None

    def forward(self, input: Tensor) -> Tensor:
        if self.input_range is None:
            return super().forward(fake_quantize_per_token(input))
        range_2 = torch.tensor(self.input_range, device=input.device)
        return super().forward(fake_quantize_to_range(input, range_2))


class ActivationQuantLinear(ActivationQuantized, nn.Linear):
    """nn.Linear with 8-bit inputs."""


class ActivationQuantConv1D(ActivationQuantized, Conv1D):
    """transformers' Conv1D, GPT-2's linear layer, with 8-bit inputs."""


def quantize_input(module: nn.Module, input_range: Sequence[float] | None) -> None:
    """Quantize the inputs of a linear layer from now on.

    The module stays the same object, with its parameters and hooks; only its class changes.

    Args:
        module: an nn.Linear or Conv1D.
        input_range: [lowest, highest] input, or None for the range of each token.
    """
    is_conv1d = isinstance(module, Conv1D)
    module.__class__ = ActivationQuantConv1D if is_conv1d else ActivationQuantLinear
    module.input_range = input_range  # type: ignore[assignment]  # nn.Module's own annotation


def dequantize(qweight_OI: Tensor, parameters: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    """Compute the weight that a quantized weight represents, (O, I) in float32.

    Args:
        qweight_OI: integers below 2^bits. Conv1D weights, which are (I, O), come transposed.
        parameters: by method,

            - linear: (q - zero) * scale, scale (G,), zero (G,); zero is 2^(bits-1) - 1 by default;
            - codebook: centroids[q], centroids (G, K). Zeros of a sparse tensor have any q: the
              caller masks them;
            - nf4: NF4[q] * scale, scale (G,).
        spec: the fields of a `QuantSpec`.
    """
    if spec["method"] == "codebook":
        return look_up(qweight_OI, parameters["centroids"].float())
    scale_G1 = parameters["scale"].float().reshape(-1, 1)
    if spec["method"] == "nf4":
        levels_1K = torch.tensor([NF4], device=qweight_OI.device)
        normal_GS = look_up(qweight_OI, levels_1K).view(len(scale_G1), -1)
        return (normal_GS * scale_G1).view(qweight_OI.shape)
    middle = torch.tensor(2 ** (spec["bits"] - 1) - 1, device=qweight_OI.device)
    zero_G1 = parameters.get("zero", middle).float().reshape(-1, 1)
    qweight_GS = qweight_OI.reshape(len(scale_G1), -1).float()
    return ((qweight_GS - zero_G1) * scale_G1).view(qweight_OI.shape)


def look_up(indices: Tensor, levels_GK: Tensor) -> Tensor:
    """levels[g, index] for the indices of each group g, in the shape of `indices`."""
    if len(levels_GK) == 1:
        return levels_GK[0].index_select(0, indices.flatten().int()).view(indices.shape)
    return levels_GK.gather(1, indices.reshape(len(levels_GK), -1).long()).view(indices.shape)


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear, Conv1D or LowRank."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def build_compressed_layers(model: nn.Module, compression: CompressionConfig) -> None:
    """Give a freshly built model the layers of its `config.compression`, before weights are loaded.

    Args:
        model: changed in place; the weights of changed layers are uninitialized.
        compression: `shapes`, `attributes`, `low_rank` and `activations` are applied.
    """
    for name, (in_features, out_features) in compression.shapes.items():
        resize(model.get_submodule(name), in_features, out_features)
    update_key_groups(model)
    for name, values in compression.attributes.items():
        for attribute, value in values.items():
            setattr(model.get_submodule(name), attribute, value)
    for name, rank in compression.low_rank.items():
        if not isinstance(model.get_submodule(name), LowRank):
            factorize(model, name, rank)
    for name, input_range in compression.activations.items():
        quantize_input(model.get_submodule(name), input_range)


def resize(module: nn.Module, in_features: int, out_features: int) -> None:
    """Replace the parameters of a linear layer by uninitialized ones of another shape."""
    if isinstance(module, Conv1D):
        module.nx, module.nf, shape = in_features, out_features, (in_features, out_features)
    else:
        shape = (out_features, in_features)
        module.in_features = in_features  # type: ignore[assignment]
        module.out_features = out_features  # type: ignore[assignment]
    for name, size in (("weight", shape), ("bias", (out_features,))):
        old = module._parameters[name]
        if old is not None:
            new = nn.Parameter(old.new_empty(size), requires_grad=old.requires_grad)
            setattr(module, name, new)


def factorize(model: nn.Module, name: str, rank: int) -> None:
    """Replace a linear layer by a :class:`LowRank` of uninitialized factors."""
    old = model.get_submodule(name)
    weight = old.get_parameter("weight")
    factors = LowRank(*in_out_features(old), rank, bias=old._parameters["bias"] is not None)
    model.set_submodule(name, factors.to(weight.device, weight.dtype))


def update_key_groups(model: nn.Module) -> None:
    """Recompute `num_key_value_groups` of grouped-query attention after its layers were resized."""
    for module in model.modules():
        if "num_key_value_groups" in vars(module) and "q_proj" in module._modules:
            queries = in_out_features(module.q_proj)[1]  # type: ignore[arg-type]
            keys = in_out_features(module.k_proj)[1]  # type: ignore[arg-type]
            module.num_key_value_groups = queries // keys  # type: ignore[assignment]
