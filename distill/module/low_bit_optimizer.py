"""AdamW whose moments take 8 bits each, from torchao."""

from importlib import import_module
from typing import Any

import torch

from distill.errors import UserError
from distill.models.frozen_weights import check_torchao


def check_low_bits(bits: int, compressed_by: list[str]) -> None:
    """Check that moments of 8 bits are possible.

    Args:
        bits: the recipe's `optimizer.bits`.
        compressed_by: keys of the callbacks that compress the student.

    Raises:
        UserError: if torchao is not installed, or a callback changes moments.
    """
    if bits != 8:
        return
    check_torchao("optimizer.bits", "8")
    import_module("torchao.optim")  # lets checkpoints hold its tensors
    if compressed_by:
        raise UserError(
            f"optimizer.bits is 8, but {compressed_by[0]} changes the optimizer's moments, which "
            "are then stored in blocks: leave optimizer.bits out"
        )


def adamw_8bit(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits in blocks of 256; those of small tensors stay float32."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=lr)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a parameter group; a tensor must stay the same tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
