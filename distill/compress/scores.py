"""How much each weight of a linear layer matters: weight, and what was seen of it -> a score of the same shape; the lowest go first.

O = output features, I = input features. A transposed layer (GPT-2's Conv1D) is handed over as its (O, I) view.
"""

from torch import Tensor


def magnitude(weight_OI: Tensor) -> Tensor:
    """|w|: what is close to zero is missed least (Han et al. 2015)."""
    return weight_OI.abs()


def wanda(weight_OI: Tensor, square_sums_I: Tensor) -> Tensor:
    """|w_oi| * ||x_i||, from the sum over tokens of each input feature's squares (Sun et al. 2023, equation 1).

    Rows share their inputs, so the score is meant to be compared within an output row.
    """
    return weight_OI.abs() * square_sums_I.sqrt()


def movement(score: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The score after one more step: score - w * dL/dw, any shape (Sanh et al. 2020, equation 4).

    It grows while gradient descent moves the weight away from zero, and falls while it moves it towards zero.
    """
    return score - weight * gradient
