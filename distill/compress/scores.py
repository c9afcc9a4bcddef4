"""Importance of each weight of a linear layer; weights with the lowest scores are pruned first.

Shapes: O = output features, I = input features. GPT-2's Conv1D weights come transposed, as (O, I).
"""

from torch import Tensor

__all__ = ["magnitude", "movement", "wanda"]


def magnitude(weight_OI: Tensor) -> Tensor:
    """|w|, of the same shape (Han et al. 2015)."""
    return weight_OI.abs()


def wanda(weight_OI: Tensor, square_sums_I: Tensor) -> Tensor:
    """|w_oi| * ||x_i||, of the same shape (Sun et al. 2023, equation 1).

    Args:
        weight_OI: the weight.
        square_sums_I: sum over tokens of the square of each input feature.
    """
    return weight_OI.abs() * square_sums_I.sqrt()


def movement(score: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """score - w * dL/dw: the score after one more step, any shape (Sanh et al. 2020, equation 4).

    It grows while gradient descent moves a weight away from zero.
    """
    return score - weight * gradient
