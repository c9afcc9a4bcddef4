"""Weights that are not trained, in fewer bits of memory: int8 and NF4 of torchao, or bfloat16."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.internals import stored_tensors
from distill.models.families import blocks

NF4_GROUP, SCALES_GROUP = 64, 256  # weights that share a scale, scales that share one
"""The sizes of Dettmers et al. 2023, QLoRA."""


def check_torchao(key: str, value: str) -> None:
    """UserError if torchao, which this value of a key needs, is not installed."""
    if find_spec("torchao") is None:
        raise UserError(
            f"{key} is {value}, but torchao is not installed: pip install 'distill[torchao]'"
        )


def quantizable_layers(model: PreTrainedModel, mode: str) -> list[nn.Linear]:
    """The linear layers in a model's blocks whose weights can be stored in fewer bits.

    Raises:
        UserError: There are none, as in GPT-2, whose weights are transposed.
    """
    layers = [
        layer
        for block in blocks(model)
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and (mode != "nf4" or fits_nf4(layer))
    ]
    if not layers:
        raise UserError(
            f"teacher.quantize is {mode}, but {type(model).__name__} has no linear layer that can "
            "be stored so: leave it out"
        )
    return layers


def quantize_blocks(model: PreTrainedModel, mode: str) -> None:
    """Store the weights of the linear layers in a model's blocks in fewer bits.

    Args:
        model: Changed in place; its weights must be frozen.
        mode: ``int8``, a scale for each row, or ``nf4``, one for 64 weights.
    """
    for layer in quantizable_layers(model, mode):
        if mode == "nf4":
            quantize_nf4(layer)
        else:
            _quantize_int8(layer)


def _quantize_int8(layer: nn.Linear) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())


def fits_nf4(layer: Any) -> bool:
    """Whether groups divide the weight, and it is not the transposed one of GPT-2."""
    return not isinstance(layer, Conv1D) and layer.weight.numel() % NF4_GROUP == 0


def quantize_nf4(layer: Any) -> None:
    """Store a layer's weight in 4 bits, if it can be: see :func:`fits_nf4`."""
    from torchao.quantization import to_nf4

    weight = layer.weight
    if weight.is_meta or not fits_nf4(layer):
        return
    groups = math.gcd(SCALES_GROUP, weight.numel() // NF4_GROUP)
    layer.weight = nn.Parameter(to_nf4(weight.detach(), NF4_GROUP, groups), requires_grad=False)


class LowPrecisionLinear(nn.Linear):
    """A linear layer that stores float32 weights in bfloat16, which holds their values exactly."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as with weights in float32, in autocast to bfloat16 or without it."""
        autocast = torch.is_autocast_enabled(input.device.type)
        weight = self.weight if autocast else self.weight.to(input.dtype)
        return functional.linear(input, weight, self.bias)


def store_in_bfloat16(layer: Any) -> None:
    """Store the weight of a linear layer in bfloat16 if that holds its values exactly.

    It does for the checkpoints of most language models.
    """
    if type(layer) is not nn.Linear or layer.weight.is_meta:
        return
    low = layer.weight.detach().bfloat16()
    if torch.equal(low.float(), layer.weight):
        layer.weight = nn.Parameter(low, requires_grad=False)
        layer.__class__ = LowPrecisionLinear


def dequantize(layer: Any) -> None:
    """Replace a layer's weight by the same values in float32."""
    layer.weight = nn.Parameter(dequantized(layer.weight.detach()).float(), requires_grad=False)
    if isinstance(layer, LowPrecisionLinear):
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def dequantized(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be stored in 4 bits."""
    original: Any = getattr(tensor, "get_original_weight", None)
    return tensor if original is None else original()


def weight_memory(model: nn.Module) -> int:
    """Bytes that the parameters of a model take in memory."""
    return sum(part.nbytes for each in model.parameters() for part in stored_tensors(each))
