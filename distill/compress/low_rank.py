"""A linear layer's weight -> two thin factors, by truncated SVD: of the weight itself, or of what it makes of its inputs.

O = output features, I = input features, R = rank, N = tokens. Everything is computed in float64, on the CPU.
"""

import torch
from torch import Tensor

FULL = 4096  # input features up to which the whole second moment is gathered; of more only its diagonal, for it grows with their square
RIDGE = 1e-6  # of the mean second moment: directions that no input had count this little, but not nothing


def worthwhile(rank: int, out: int, inputs: int) -> bool:
    """Whether factors of this rank hold fewer numbers than the weight."""
    return rank * (out + inputs) < out * inputs


def largest(out: int, inputs: int) -> int:
    """The largest rank that is worthwhile; 0 where none is."""
    return (out * inputs - 1) // (out + inputs)


def second_moment(input_ND: Tensor) -> Tensor:
    """Sum of x x^T over the tokens, (I, I); of more than FULL features its diagonal, (I,)."""
    with torch.autocast(input_ND.device.type, enabled=False):
        return input_ND.T @ input_ND if input_ND.shape[1] <= FULL else input_ND.square().sum(0)


def root(moment: Tensor) -> Tensor:
    """S with S S^T = the second moment, (I, I) or, of a diagonal one, (I,)."""
    moment = moment.double().cpu()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    ridge = RIDGE * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    if moment.ndim == 1:
        return (moment + ridge).sqrt()
    values_I, vectors_II = torch.linalg.eigh(moment)
    return vectors_II * (values_I.clamp_min(0) + ridge).sqrt()


def scaled(weight_OI: Tensor, moment: Tensor | None = None) -> Tensor:
    """W S, whose Frobenius norm is that of the outputs W X, S S^T being the inputs' second moment; without one it is W."""
    weight_OI = weight_OI.detach().double().cpu()
    if moment is None:
        return weight_OI
    scale = root(moment)
    return weight_OI * scale if scale.ndim == 1 else weight_OI @ scale


def spectrum(weight_OI: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors of W S, (O, min(O, I)), and its singular values, from the largest to the smallest."""
    left_OR, values_R, _ = torch.linalg.svd(scaled(weight_OI, moment), full_matrices=False)
    return left_OR, values_R


def rank_of(values_R: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share, in (0, 1], of the squared singular values; 1 leaves out exact zeros only."""
    lost_R = values_R.square().flip(0).cumsum(0).flip(0)  # [r]: what rank r leaves out
    return max(1, int((lost_R > (1 - energy) * lost_R[0]).sum()))


def factors(weight_OI: Tensor, left_OR: Tensor) -> tuple[Tensor, Tensor]:
    """(second_OR, first_RI), whose product W' minimises ||(W - W') S|| where `left_OR` are the first R of :func:`spectrum`'s vectors.

    W' = U U^T W, as SVD-LLM (Wang et al. 2024) has it, without its inverse of S: the moment may be singular.
    Without a moment this is the truncated SVD. Balanced: second^T second = first first^T.
    """
    turn_RR, values_R, right_RI = torch.linalg.svd(
        left_OR.T @ weight_OI.detach().double().cpu(), full_matrices=False
    )
    second_OR = left_OR @ turn_RR * values_R.sqrt()
    first_RI = values_R.sqrt()[:, None] * right_RI
    return second_OR.to(weight_OI), first_RI.to(weight_OI)
