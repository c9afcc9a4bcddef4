"""The weight of a linear layer -> two factors, by truncated SVD in float64 on the CPU.

The approximation is optimal for the weight itself or, with a second moment of the inputs, for the
outputs on these inputs.

Shapes: O = output features, I = input features, R = rank, N = tokens.
"""

import torch
from torch import Tensor

__all__ = [
    "factors",
    "max_rank",
    "rank_for_energy",
    "saves_parameters",
    "second_moment",
    "spectrum",
]

MAX_FEATURES = 4096  # above this only the diagonal is accumulated: the matrix grows quadratically
RIDGE = 1e-6  # share of the mean second moment that is added to its diagonal


def saves_parameters(rank: int, out_features: int, in_features: int) -> bool:
    """Whether factors of this rank have fewer parameters than the weight."""
    return rank * (out_features + in_features) < out_features * in_features


def max_rank(out_features: int, in_features: int) -> int:
    """The largest rank that saves parameters; 0 if none does."""
    return (out_features * in_features - 1) // (out_features + in_features)


def second_moment(input_ND: Tensor) -> Tensor:
    """Sum of x x^T over tokens, (I, I); only its diagonal, (I,), for more than 4096 features."""
    with torch.autocast(input_ND.device.type, enabled=False):
        if input_ND.shape[1] <= MAX_FEATURES:
            return input_ND.T @ input_ND
        return input_ND.square().sum(0)


def _moment_root(moment: Tensor) -> Tensor:
    """S with S S^T = the second moment plus a ridge: (I, I), or (I,) for a diagonal moment.

    The ridge gives some weight to directions without inputs.
    """
    moment = moment.double().cpu()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    ridge = RIDGE * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    if moment.ndim == 1:
        return (moment + ridge).sqrt()
    values_I, vectors_II = torch.linalg.eigh(moment)
    return vectors_II * (values_I.clamp_min(0) + ridge).sqrt()


def _scale_by_inputs(weight_OI: Tensor, moment: Tensor | None) -> Tensor:
    """W S, whose Frobenius norm is that of the outputs W X; W without a moment."""
    weight_OI = weight_OI.detach().double().cpu()
    if moment is None:
        return weight_OI
    root = _moment_root(moment)
    return weight_OI * root if root.ndim == 1 else weight_OI @ root


def spectrum(weight_OI: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Singular value decomposition of a weight, or of its outputs.

    Args:
        weight_OI: the weight.
        moment: second moment of the inputs, from :func:`second_moment`; None for the weight alone.

    Returns:
        Left singular vectors, (O, min(O, I)), and singular values in descending order.
    """
    scaled_OI = _scale_by_inputs(weight_OI, moment)
    left_OR, values_R, _ = torch.linalg.svd(scaled_OI, full_matrices=False)
    return left_OR, values_R


def rank_for_energy(values_R: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the energy.

    Args:
        values_R: singular values in descending order.
        energy: share of the sum of their squares, in (0, 1]; 1 drops exact zeros only.
    """
    lost_R = values_R.square().flip(0).cumsum(0).flip(0)  # [r]: the energy that rank r discards
    return max(1, int((lost_R > (1 - energy) * lost_R[0]).sum()))


def factors(weight_OI: Tensor, left_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank R with the smallest error.

    Their product is W' = U U^T W, where U are the first R left singular vectors of W S. It
    minimizes ||(W - W') S|| as in SVD-LLM (Wang et al. 2024), but does not need the inverse of S.

    Args:
        weight_OI: the weight W.
        left_OR: U, from :func:`spectrum`.

    Returns:
        second_OR and first_RI, in the dtype of the weight, balanced:
        second^T second = first first^T.
    """
    turn_RR, values_R, right_RI = torch.linalg.svd(
        left_OR.T @ weight_OI.detach().double().cpu(), full_matrices=False
    )
    second_OR = left_OR @ turn_RR * values_R.sqrt()
    first_RI = values_R.sqrt()[:, None] * right_RI
    return second_OR.to(weight_OI), first_RI.to(weight_OI)
