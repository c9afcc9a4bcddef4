"""Layer normalisation in elementary operators: ONNX Runtime's own one on CPUs adds up a row number by number."""

import torch
from torch import Tensor, nn


class DecomposedLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, as a graph of operators that are vectorised each."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        # 1 / sqrt, not a quotient: the runtime would know that one for what it is
        scaled = centred * torch.reciprocal(
            torch.sqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
        )
        scaled = scaled if self.weight is None else scaled * self.weight
        return scaled if self.bias is None else scaled + self.bias


def decompose_layer_norms(model: nn.Module) -> None:
    """Replace what normalises rows; several dimensions at once stay as they are."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            model.set_submodule(name, DecomposedLayerNorm(module))
