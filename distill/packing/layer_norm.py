"""Layer normalization in elementary operators, which ONNX Runtime vectorizes on CPUs.

Its LayerNormalization operator sums a row sequentially.
"""

import torch
from torch import Tensor, nn


class DecomposedLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        centered = input - input.mean(-1, keepdim=True)
        # The runtime would fuse a division back into that operator.
        scaled = centered * torch.reciprocal(
            torch.sqrt((centered * centered).mean(-1, keepdim=True) + self.eps)
        )
        scaled = scaled if self.weight is None else scaled * self.weight
        return scaled if self.bias is None else scaled + self.bias


def decompose_layer_norms(model: nn.Module) -> None:
    """Replace the layer norms over the last dimension, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            model.set_submodule(name, DecomposedLayerNorm(module))
