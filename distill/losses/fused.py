"""The usual loss of a language model in one Triton kernel, where a GPU and Triton are there.

    alpha * cross entropy + (1 - alpha) * divergence, T^2 included

Other losses, other devices, and a GPU on which the kernel does not give the values and gradients of
`divergences.py` use autograd.

n = rows, V = vocabulary.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses import divergences

logger = logging.getLogger(__name__)

KINDS = {"forward_kl": 1, "reverse_kl": 2, "jensen_shannon": 3, "skew_kl": 4}  # as in kernels.py
TOLERANCE = 1e-4  # of the kernel against autograd, relative to the largest value


class FusedLoss(NamedTuple):
    """A loss that the kernel computes.

    Args:
        alpha: Weight of the labels; 1 - alpha is that of the divergence.
        temperature: T.
        divergence: A key of KINDS.
        beta: Weight of the teacher in a mixture.
    """

    alpha: float
    temperature: float
    divergence: str
    beta: float = 0.5

    def sums(self, student_nV: Tensor, teacher_nV: Tensor | None, labels_n: Tensor) -> Tensor:
        """Loss, cross entropy and divergence by autograd, each summed over the rows, (3,)."""
        supervised_n = divergences.cross_entropy(student_nV, labels_n)
        divergence_n = torch.zeros_like(supervised_n)
        if teacher_nV is not None:
            function = getattr(divergences, self.divergence)
            mixture = {"beta": self.beta} if KINDS[self.divergence] > 2 else {}
            divergence_n = function(student_nV, teacher_nV, self.temperature, **mixture)
        loss_n = divergences.distillation(supervised_n, divergence_n, self.alpha)
        return torch.stack([loss_n.sum(), supervised_n.sum(), divergence_n.sum()])


def recognize(
    label_loss: Callable, divergence: Callable, alpha: float, temperature: float
) -> FusedLoss | None:
    """The loss for the kernel, None if the kernel does not compute these functions."""
    mixture = divergence.keywords if isinstance(divergence, partial) else {}
    function = divergence.func if isinstance(divergence, partial) else divergence
    name = getattr(function, "__name__", "")
    if (
        label_loss is not divergences.cross_entropy
        or name not in KINDS
        or function is not getattr(divergences, name)
        or not mixture.keys() <= {"beta"}
    ):
        return None
    return FusedLoss(float(alpha), float(temperature), name, float(mixture.get("beta", 0.5)))


def sums_and_gradient(
    loss: FusedLoss,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    labels_n: Tensor,
    gradient_nV: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """Loss, cross entropy and divergence of some rows, each summed, (3,).

    Args:
        loss: The loss.
        student_nV: Logits, float32.
        teacher_nV: Logits in any floating dtype; None for the cross entropy alone.
        labels_n: A column for each row, or -100.
        gradient_nV: Receives the gradient with respect to the student's logits, limited to the
            numbers of its dtype; the student's logits may be overwritten. None computes none.
        scale: Factor of the gradient.
    """
    assert teacher_nV is None or teacher_nV.shape == student_nV.shape
    settings = [loss.alpha, loss.temperature, loss.beta, scale]
    arguments = (student_nV, teacher_nV, labels_n, gradient_nV)
    supervised, divergence = loss_rows(*arguments, loss.divergence, settings).sum(1)
    total = divergences.distillation(supervised, divergence, loss.alpha)
    return torch.stack([total, supervised, divergence])


@torch.library.custom_op("distill::loss_rows", mutates_args={"gradient_nV"})
def loss_rows(
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    labels_n: Tensor,
    gradient_nV: Tensor | None,
    divergence: str,
    settings: list[float],
) -> Tensor:
    """The kernel as an operator of torch, so that tensors need not have memory.

    Args:
        student_nV: As for :func:`sums_and_gradient`, with the following arguments.
        teacher_nV: Likewise.
        labels_n: Likewise.
        gradient_nV: Likewise.
        divergence: A key of KINDS.
        settings: alpha, T, beta, and the factor of the gradient.

    Returns:
        Cross entropy and divergence of each row, (2, n).
    """
    from distill.losses import kernels

    values_2n = student_nV.new_zeros(2, len(student_nV))
    if not len(student_nV):
        return values_2n
    alpha, temperature, beta, scale = settings
    kind = 0 if teacher_nV is None else KINDS[divergence]
    teacher_nV = student_nV if teacher_nV is None else teacher_nV
    written_nV = student_nV if gradient_nV is None else gradient_nV
    kernels.loss_rows[(len(student_nV),)](
        *(student_nV, teacher_nV, labels_n, *values_2n, written_nV),
        *(tensor.stride(0) for tensor in (student_nV, teacher_nV, written_nV)),
        student_nV.shape[1],
        *(alpha, temperature, beta, _log(beta), _log(1 - beta), scale),
        torch.finfo(written_nV.dtype).max,
        KIND=kind,
        TEMPERED=temperature != 1,
        SUMS=kind > 1 or (kind == 1 and gradient_nV is None),
        GRADIENT=gradient_nV is not None,
        BLOCK=kernels.BLOCK,
        num_warps=kernels.WARPS,
    )
    return values_2n


@loss_rows.register_fake
def _(student_nV: Tensor, *_: Any) -> Tensor:
    return student_nV.new_empty(2, len(student_nV))


def _log(share: float) -> float:
    return log(share) if share > 0 else -float("inf")


@lru_cache
def is_exact(loss: FusedLoss, device: torch.device, dtype: torch.dtype, aligned: bool) -> bool:
    """Whether the kernel compiles on a device, and gives what autograd gives.

    Tried once with a few rows. If not, the reason is logged, and autograd is used.

    Args:
        loss: The loss.
        device: A CUDA device.
        dtype: The dtype of the gradient.
        aligned: Whether 16 divides the width, for which Triton compiles another kernel.
    """
    try:
        error = kernel_error(loss, device, dtype, 3008 if aligned else 3001)
    except Exception as reason:  # noqa: BLE001 - compilers fail in many ways, and autograd is there
        logger.warning(
            "the loss is computed by autograd: its kernel fails on %s: %s", device, reason
        )
        return False
    if not error < TOLERANCE + torch.finfo(dtype).eps:
        logger.warning(
            "the loss is computed by autograd: its kernel is wrong by %.1e on %s", error, device
        )
        return False
    return True


def kernel_error(loss: FusedLoss, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest error of the kernel against autograd, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    rows = 4
    student, teacher = (torch.randn(rows, width, generator=generator).to(device) for _ in "st")
    labels = torch.tensor([0, width - 1, divergences.IGNORED, 7], device=device)
    gradient = torch.empty(rows, width, dtype=dtype, device=device)
    values = sums_and_gradient(loss, student, teacher, labels, gradient)
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        expected = loss.sums(student, teacher, labels)
        (slope,) = torch.autograd.grad(expected[0], student)
    errors = [
        (value.float() - right).abs().max() / right.abs().max()
        for value, right in ((values, expected.detach()), (gradient, slope))
    ]
    return torch.stack(errors).max().item()
