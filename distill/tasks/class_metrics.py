"""Metrics of classifiers from counts, in memory that grows with rows plus classes.

Where a class has no example and no prediction, its F1 is undefined and left out of means.

N = rows, C = classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ECE_BINS = 15  # bins of the expected calibration error


class Counts(NamedTuple):
    """Decisions about each class, each (C,)."""

    correct: Tensor  # examples of the class that were predicted to be
    predicted: Tensor
    actual: Tensor

    def f1(self) -> Tensor:
        """Harmonic mean of precision and recall of each class, NaN if undefined, (C,)."""
        return 2 * self.correct.float() / (self.predicted + self.actual).float()

    def macro_f1(self) -> float:
        """Mean over the classes of which F1 is defined, NaN if there are none."""
        f1_C = self.f1()
        return float((f1_C.nan_to_num() / (~f1_C.isnan()).sum()).sum()) if len(f1_C) else math.nan

    def micro_f1(self) -> float:
        """F1 of all decisions together, NaN if undefined."""
        return float(Counts(*(column.sum() for column in self)).f1())

    def f1_by_name(self, names: Sequence[str]) -> dict[str, float]:
        """F1 of each class that has examples: of the others, a model cannot be right."""
        has_examples = (self.actual > 0).tolist()
        values = zip(names, self.f1().tolist(), has_examples, strict=True)
        return {f"f1/{name}": value for name, value, held in values if held}


def count_one_of_c(prediction_N: Tensor, label_N: Tensor, classes: int) -> Counts:
    """Counts where each row has one class."""
    columns = (label_N[prediction_N == label_N], prediction_N, label_N)
    return Counts(*(torch.bincount(column, minlength=classes) for column in columns))


def count_any_of_c(prediction_NC: Tensor, label_NC: Tensor) -> Counts:
    """Counts where each row has any number of classes; both tensors are boolean."""
    columns = (prediction_NC & label_NC, prediction_NC, label_NC)
    return Counts(*(column.sum(0) for column in columns))


def matthews_correlation(counts: Counts, rows: int) -> float:
    """Matthews correlation of one class per row (Gorodkin 2004), 0 where it is undefined.

    It is undefined if all labels or all predictions are of one class.
    """
    correct = int(counts.correct.sum())
    predicted, actual = (column.tolist() for column in (counts.predicted, counts.actual))
    covariance = correct * rows - sum(p * a for p, a in zip(predicted, actual, strict=True))
    variances = [rows**2 - sum(count**2 for count in column) for column in (predicted, actual)]
    if not all(variances):
        return 0.0
    return covariance / math.sqrt(variances[0]) / math.sqrt(variances[1])


def pooled_matthews_correlation(counts: Counts, rows: int) -> float:
    """Matthews correlation of all decisions, one per row and class; 0 where it is undefined."""
    total = rows * len(counts.actual)
    correct, predicted, actual = (int(column.sum()) for column in counts)
    wrong = predicted + actual - 2 * correct
    yes_no = Counts(
        torch.tensor([correct, total - wrong - correct]),
        torch.tensor([predicted, total - predicted]),
        torch.tensor([actual, total - actual]),
    )
    return matthews_correlation(yes_no, total)


def calibration_error(confidence_N: Tensor, correct_N: Tensor) -> float:
    """Expected calibration error: mean of |accuracy - confidence| over bins, weighted by rows.

    The bins are [0, 1/15), [1/15, 2/15), ..., [14/15, 1].

    Args:
        confidence_N: Probabilities.
        correct_N: 1 for rows of which the predicted event happened, else 0.
    """
    edges = torch.arange(1, ECE_BINS, dtype=torch.double, device=confidence_N.device) / ECE_BINS
    bin_N = torch.bucketize(confidence_N, edges.to(confidence_N.dtype), right=True)
    gap_N = correct_N.double() - confidence_N.double()
    gaps = torch.zeros(ECE_BINS, dtype=torch.double, device=gap_N.device)
    return float(gaps.index_add(0, bin_N, gap_N).abs().sum() / len(gap_N))
