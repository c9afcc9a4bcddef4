"""Whether the weights of a model are finite numbers."""

import torch
from torch import Tensor, nn

from distill import internals
from distill.errors import UserError

__all__ = ["check_finite"]


@torch.no_grad()
def check_finite(model: nn.Module, name: str | None, role: str) -> None:
    """Check that all weights of a model are finite; those of the meta device have no values.

    Reads each tensor once, and waits for a device once.

    Args:
        model: A model that was loaded or initialized.
        name: Its name in the recipe; None if it was initialized from a config.
        role: `teacher` or `student`.

    Raises:
        UserError: A tensor holds NaN or infinite numbers.
    """
    tensors = [
        (tensor, part)
        for tensor, each in model.named_parameters()
        for part in internals.stored_tensors(each)
        if part.is_floating_point() and part.numel() and not part.is_meta
    ]
    if not tensors:
        return
    # NaN and infinities survive in the extremes.
    extremes = [torch.stack(_readable(each).aminmax()).double() for _, each in tensors]
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    wrong = [pair for pair, each in zip(tensors, finite, strict=True) if not each]
    if wrong:
        raise UserError(_describe([tensor for tensor, _ in wrong], wrong[0][1], name, role))


def _readable(tensor: Tensor) -> Tensor:
    """A tensor in a float type that has arithmetic; those of 8 bits have none."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _describe(wrong: list[str], first: Tensor, name: str | None, role: str) -> str:
    count = int((~_readable(first).isfinite()).sum())
    others = f", one of {len(wrong)} such tensors," if len(wrong) > 1 else ""
    values = f"{count} of the {first.numel()} weights in {wrong[0]}{others} are NaN or infinite"
    if name is None:
        return (
            f"{role}.config gives a random model, but {values}: correct the keys of its "
            "initialization, or leave them out"
        )
    return (
        f"{role}.model is {name}, but {values}: save or download the model again, or choose "
        "another one"
    )
