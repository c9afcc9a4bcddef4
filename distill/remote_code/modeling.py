"""What a compressed model needs to load: this one file, torch, safetensors and transformers.

It travels with every export that the model's config alone cannot describe, and imports nothing else of the library that wrote it:

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

`config.compression` says what is special about the weights:

    shapes       {module: [in, out]}                    linear layers of other widths than the config's
    low_rank     {module: rank}                         linear layers stored as two factors
    activations  {module: {bits, range: [low, high]}}   linear layers whose inputs are rounded; range null: to each token's own
    weights      {tensor: {method, bits, ...}}          how stored codes become weights; of no concern once they are loaded

O = output features, or rows of an embedding; I = input features; G = groups of neighbours that share a grid, S = their size; K = 2^bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# The quantiles of a normal distribution, scaled to [-1, 1], 0 among them (Dettmers et al. 2023, "QLoRA", appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


LINEAR = (nn.Linear, Conv1D)


def compression_of(config: Any) -> dict[str, Any]:
    """`config.compression`; nothing where the config has none."""
    return getattr(config, "compression", None) or {}


class LowRank(nn.Module):
    """y = second(first(x)): a linear layer as the product of two, through `rank` features."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The matrix that it stands for, (O, I): GPT-2 looks at it when it is built."""
        return self.second.weight @ self.first.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input))


class StraightThrough(torch.autograd.Function):
    """The second tensor as value, the first one's gradient: where `inside` is given, only there, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inside)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return (gradients[0] if inside is None else gradients[0] * inside), None, None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low_code: int, high_code: int) -> Tensor:
    """(clamp(round(x / scale) + zero, low_code, high_code) - zero) * scale; its gradient is 1 inside the range and 0 outside."""
    with torch.no_grad():
        code = torch.round(x / scale) + zero
        kept = code.clamp(low_code, high_code)
        value, inside = (kept - zero) * scale, kept == code
    return StraightThrough.apply(x, value, inside)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Each token's features on its own affine int8 grid, bit for bit as torchao's `int8_asym_per_token` does it in the dtype of `x`."""
    with torch.no_grad():
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255.0).clamp(min=torch.finfo(x.dtype).smallest_normal)
        zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
        code = (torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127)
        value = (code - zero) * scale
    return StraightThrough.apply(x, value)


def fake_quantize_to_range(x: Tensor, range_2: Tensor) -> Tensor:
    """All features on one affine uint8 grid from low to high, 0 on it: computed in float32 whatever the dtype of `x`."""
    low, high = range_2[0].clamp(max=0), range_2[1].clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = torch.round(-low / scale).clamp(0, 255)
    return fake_quantize(x.float(), scale, zero, 0, 255).to(x.dtype)


class ActivationQuantized(nn.Module):
    """What makes a linear layer round its input to 2^8 levels: of `input_range`, or where that is None of each token's own range."""

    input_range: Sequence[float] | None

    def forward(self, input: Tensor) -> Tensor:
        if self.input_range is None:
            return super().forward(fake_quantize_per_token(input))
        return super().forward(
            fake_quantize_to_range(input, torch.tensor(self.input_range, device=input.device))
        )


class ActivationQuantLinear(ActivationQuantized, nn.Linear):
    """A linear layer on rounded inputs."""


class ActivationQuantConv1D(ActivationQuantized, Conv1D):
    """GPT-2's linear layer on rounded inputs."""


def quantize_input(module: nn.Module, input_range: Sequence[float] | None) -> None:
    """Make this linear layer round its input; it stays the same object, with its parameters and hooks."""
    module.__class__ = (
        ActivationQuantConv1D if isinstance(module, Conv1D) else ActivationQuantLinear
    )
    module.input_range = input_range  # type: ignore[assignment]  # nn.Module's own annotation


def dequantize(codes_OI: Tensor, parameters: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    """Stored codes -> weight_OI in float32; of GPT-2's Conv1D, whose weight is (I, O), the transposed one.

    linear    (code - zero) * scale      scale (G,), zero (G,); without zero it is the middle code, 2^(bits-1) - 1
    codebook  centroids[code]            centroids (G, K); the zeros of a sparse tensor have any code, the caller masks them
    nf4       NF4[code] * scale          scale (G,)
    """
    if spec["method"] == "codebook":
        return look_up(codes_OI, parameters["centroids"].float())
    scale_G1 = parameters["scale"].float().reshape(-1, 1)
    if spec["method"] == "nf4":
        levels_1K = torch.tensor([NF4], device=codes_OI.device)
        return (look_up(codes_OI, levels_1K).view(len(scale_G1), -1) * scale_G1).view(
            codes_OI.shape
        )
    middle = torch.tensor(2 ** (spec["bits"] - 1) - 1, device=codes_OI.device)
    zero_G1 = parameters.get("zero", middle).float().reshape(-1, 1)
    return ((codes_OI.reshape(len(scale_G1), -1).float() - zero_G1) * scale_G1).view(codes_OI.shape)


def look_up(codes: Tensor, levels_GK: Tensor) -> Tensor:
    """levels[g, code] of each group's codes, in the shape of the codes."""
    if len(levels_GK) == 1:
        return levels_GK[0].index_select(0, codes.flatten().int()).view(codes.shape)
    return levels_GK.gather(1, codes.reshape(len(levels_GK), -1).long()).view(codes.shape)


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, also of GPT-2's transposed one."""
    return (
        (module.nx, module.nf)
        if isinstance(module, Conv1D)
        else (module.in_features, module.out_features)
    )  # type: ignore[return-value]


def apply(model: nn.Module, compression: dict[str, Any]) -> None:
    """Give a freshly built model the modules that `config.compression` describes; weights are loaded afterwards."""
    for name, (into, out) in compression.get("shapes", {}).items():
        resize(model.get_submodule(name), into, out)
    update_key_groups(model)
    for name, rank in compression.get("low_rank", {}).items():
        if not isinstance(model.get_submodule(name), LowRank):
            factorize(model, name, rank)
    for name, rounded in compression.get("activations", {}).items():
        quantize_input(model.get_submodule(name), rounded["range"])


def resize(module: nn.Module, into: int, out: int) -> None:
    """Empty parameters of other widths, in the same module."""
    if isinstance(module, Conv1D):
        module.nx, module.nf, shape = into, out, (into, out)
    else:
        module.in_features, module.out_features, shape = into, out, (out, into)  # type: ignore[assignment]
    for name, size in (("weight", shape), ("bias", (out,))):
        old = module._parameters[name]
        if old is not None:
            setattr(
                module, name, nn.Parameter(old.new_empty(size), requires_grad=old.requires_grad)
            )


def factorize(model: nn.Module, name: str, rank: int) -> None:
    """Two empty factors in the place of a linear layer."""
    old = model.get_submodule(name)
    weight = old.get_parameter("weight")
    factors = LowRank(*in_out_features(old), rank, bias=old._parameters["bias"] is not None)
    model.set_submodule(name, factors.to(weight.device, weight.dtype))


def update_key_groups(model: nn.Module) -> None:
    """Attention in which several query heads share a key head counts them anew, where their widths have changed."""
    for module in model.modules():
        if "num_key_value_groups" in vars(module) and "q_proj" in module._modules:
            module.num_key_value_groups = (
                in_out_features(module.q_proj)[1] // in_out_features(module.k_proj)[1]
            )  # type: ignore[arg-type, assignment]
