"""How the predictions of an export compare with the student's.

Shapes: N = rows of logits that count, C = classes or vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Predictions whose logits differ by less than this share of the largest logit are a tie.
NEAR = 1e-4
# dtype -> spacing of its numbers, relative to their size: nearer ones may be rounded to the same.
SPACING = {"bfloat16": torch.finfo(torch.bfloat16).eps, "float16": torch.finfo(torch.float16).eps}


class NotComparableError(Exception):
    """The answers of an export cannot be compared with the student's; the message says why."""


class Comparison(NamedTuple):
    """How the answers of an export compare with the student's."""

    rows: int  # compared rows: one per text, or one per token
    agreement: float  # share of rows with the same prediction
    difference: float  # largest absolute difference of a logit
    scale: float  # largest absolute logit of the student
    # Rows with another prediction that numbers of this dtype cannot tell from the student's.
    near_ties: Mapping[str, int] = {}


class RuntimeComparison(NamedTuple):
    """How the answers of a runtime's program compare with the student's."""

    agreed_N: Tensor  # 1 where the prediction is the student's, else 0
    difference: float  # largest absolute difference of a logit
    scale: float  # largest absolute logit of the student
    # Rows of logits of each batch, (N, C); None if the answers do not hold all logits.
    export: list[Tensor] | None
    student: list[Tensor] | None


def break_ties(student_NC: Tensor, export_NC: Tensor, near_N1: Tensor) -> Tensor:
    """Move each logit of the student towards the export's by at most `near_N1`.

    A prediction that this changes was a tie.
    """
    return export_NC.clamp(student_NC - near_N1, student_NC + near_N1)


def is_likeliest(student_NC: Tensor, chosen_N: Tensor, scale: float) -> Tensor:
    """1 for tokens that are the student's most likely, or tied with it, else 0, (N,)."""
    chosen_logit_N = student_NC.gather(1, chosen_N[:, None])[:, 0]
    return (student_NC.amax(-1) - chosen_logit_N <= NEAR * scale).float()
