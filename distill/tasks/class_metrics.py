"""Metrics of classifiers from weighted counts, in memory that grows with rows plus classes.

Each set of weights gives one value of each metric: weights of 1 that of all rows, the numbers of
times that rows were drawn that of a bootstrap resample. Where a class has no example and no
prediction, its F1 is undefined and left out of means.

N = rows, C = classes, R = sets of weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ECE_BINS = 15  # bins of the expected calibration error


class Counts(NamedTuple):
    """Weighted decisions about each class, each (C, R) in float64."""

    correct: Tensor  # examples of the class that were predicted to be
    predicted: Tensor
    actual: Tensor

    def f1(self) -> Tensor:
        """Harmonic mean of precision and recall of each class, NaN if undefined, (C, R)."""
        return 2 * self.correct / (self.predicted + self.actual)

    def macro_f1(self) -> Tensor:
        """Mean over the classes of which F1 is defined, NaN if there are none, (R,)."""
        return self.f1().nanmean(0)

    def micro_f1(self) -> Tensor:
        """F1 of all decisions together, NaN if undefined, (R,)."""
        return Counts(*(column.sum(0) for column in self)).f1()

    def f1_by_name(self, names: Sequence[str]) -> dict[str, Tensor]:
        """F1 of each class that has examples: of the others, a model cannot be right, (R,)."""
        held_CR = self.actual > 0
        f1_CR = torch.where(held_CR, self.f1(), torch.nan)
        values = zip(names, f1_CR, held_CR.any(1).tolist(), strict=True)
        return {f"f1/{name}": value for name, value, held in values if held}


def count_one_of_c(
    prediction_N: Tensor, label_N: Tensor, classes: int, weights_NR: Tensor
) -> Counts:
    """Counts where each row has one class."""
    right_N = prediction_N == label_N
    columns = (
        (label_N[right_N], weights_NR[right_N]),
        (prediction_N, weights_NR),
        (label_N, weights_NR),
    )
    zeros_CR = weights_NR.new_zeros(classes, weights_NR.shape[1])
    return Counts(*(zeros_CR.index_add(0, ids, weights) for ids, weights in columns))


def count_any_of_c(prediction_NC: Tensor, label_NC: Tensor, weights_NR: Tensor) -> Counts:
    """Counts where each row has any number of classes; both tensors are boolean."""
    columns = (prediction_NC & label_NC, prediction_NC, label_NC)
    return Counts(*(column.T.to(weights_NR.dtype) @ weights_NR for column in columns))


def matthews_correlation(counts: Counts, rows_R: Tensor) -> Tensor:
    """Matthews correlation of one class per row (Gorodkin 2004), 0 where it is undefined, (R,).

    It is undefined if all labels or all predictions are of one class.

    Args:
        counts: Counts of the classes.
        rows_R: The sum of each set of weights.
    """
    correct, predicted, actual = counts
    wrong, missed = predicted - correct, actual - correct
    rest = rows_R - correct - wrong - missed
    # These forms of the covariance and variances are exact for large counts too.
    covariance_R = (correct * rest - wrong * missed).sum(0)
    variances = [(column * (rows_R - column)).sum(0) for column in (predicted, actual)]
    scale_R = variances[0].sqrt() * variances[1].sqrt()
    undefined_R = torch.where(rows_R > 0, 0.0, torch.nan)
    return torch.where(scale_R > 0, covariance_R / scale_R, undefined_R)


def pooled_matthews_correlation(counts: Counts, rows_R: Tensor) -> Tensor:
    """Matthews correlation of all decisions, one per row and class; 0 where undefined, (R,)."""
    total_R = rows_R * len(counts.actual)
    correct, predicted, actual = (column.sum(0) for column in counts)
    wrong = predicted + actual - 2 * correct
    yes_no = Counts(
        torch.stack([correct, total_R - wrong - correct]),
        torch.stack([predicted, total_R - predicted]),
        torch.stack([actual, total_R - actual]),
    )
    return matthews_correlation(yes_no, total_R)


def calibration_error(confidence: Tensor, correct: Tensor, weights_NR: Tensor) -> Tensor:
    """Expected calibration error: weighted mean of |accuracy - confidence| over bins, (R,).

    The bins are [0, 1/15), [1/15, 2/15), ..., [14/15, 1].

    Args:
        confidence: Probabilities, (N,), or (N, C) where a row has several events.
        correct: 1 for predicted events that happened, else 0.
        weights_NR: Weights of the rows.
    """
    rows, events = len(confidence), confidence[0].numel() if len(confidence) else 1
    edges = torch.arange(1, ECE_BINS, dtype=torch.double, device=confidence.device) / ECE_BINS
    bins = torch.bucketize(confidence.contiguous(), edges.to(confidence.dtype), right=True)
    places = bins.view(rows, events) + ECE_BINS * torch.arange(rows, device=bins.device)[:, None]
    gaps = correct.double() - confidence.double()
    by_bin = gaps.new_zeros(rows * ECE_BINS).index_add(0, places.flatten(), gaps.flatten())
    by_bin_NB = by_bin.view(rows, ECE_BINS)
    return (by_bin_NB.T @ weights_NR).abs().sum(0) / (weights_NR.sum(0) * events)
