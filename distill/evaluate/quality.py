"""outcomes -> metrics with 95 % intervals, and a paired comparison of two models on the same examples.

Examples are what is resampled. The same seed draws the same examples for every model, so that the draws of two models are
paired: their difference is free of what makes some test sets easier than others.
"""

import math
import warnings
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.tasks.base import Task

LEVEL = 0.95
NORMAL = NormalDist()
ROUNDING = 1e-9  # relative difference below which two test statistics are the same one


class Interval(NamedTuple):
    """A metric and the ends of its 95 % interval; NaN where it cannot be known."""

    value: float
    low: float
    high: float


class Bootstrap(NamedTuple):
    """The metrics of a set of examples, and of `resamples` sets drawn from it with replacement."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # metric -> (resamples,)

    def intervals(self) -> dict[str, Interval]:
        """Each metric with its interval."""
        return {
            metric: interval(value, self.draws[metric]) for metric, value in self.values.items()
        }


def bootstrap(task: Task, columns: dict[str, Tensor], resamples: int, seed: int) -> Bootstrap:
    """Measure the examples and `resamples` sets of as many, drawn with replacement."""
    values = task.quality(columns)
    size = len(next(iter(columns.values())))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a resample may lack a class, or all variance: its metric is then NaN and left out
        drawn = [
            task.quality({name: column[pick] for name, column in columns.items()})
            for pick in _picks(size, resamples, seed)
        ]
    return Bootstrap(
        values,
        {metric: np.array([draw.get(metric, math.nan) for draw in drawn]) for metric in values},
    )


def _picks(size: int, resamples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(size, (size,), generator=generator) for _ in range(resamples))


def interval(value: float, draws: np.ndarray) -> Interval:
    """The bias-corrected percentile interval (Efron 1981), widened where needed to hold the value itself.

    The correction matters for metrics that resampling inflates, such as the calibration error: a resample holds duplicates.
    """
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(draws) == 0:
        return Interval(value, math.nan, math.nan)
    below = float(np.mean(draws < value) + np.mean(draws == value) / 2)
    shift = 2 * NORMAL.inv_cdf(min(max(below, 0.5 / len(draws)), 1 - 0.5 / len(draws)))
    reach = NORMAL.inv_cdf((1 + LEVEL) / 2)
    low, high = np.quantile(draws, [NORMAL.cdf(shift - reach), NORMAL.cdf(shift + reach)])
    return Interval(value, min(float(low), value), max(float(high), value))


def share_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927): unlike resampling, it does not take 1.0 of a few texts for certain."""
    reach = NORMAL.inv_cdf((1 + LEVEL) / 2) ** 2 / count
    middle = (share + reach / 2) / (1 + reach)
    half = math.sqrt(reach * (share * (1 - share) + reach / 4)) / (1 + reach)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def difference(student: Bootstrap, teacher: Bootstrap, metric: str) -> Interval:
    """Student minus teacher, from paired draws: both must come from the same examples, resamples and seed."""
    return interval(
        student.values[metric] - teacher.values[metric],
        student.draws[metric] - teacher.draws[metric],
    )


def randomisation(
    task: Task, student: dict[str, Tensor], teacher: dict[str, Tensor], rounds: int, seed: int
) -> float:
    """Two-sided p-value of the difference in the primary metric, by swapping the models' outcomes example by example.

    Were the models equally good, a swap would change nothing but chance: p is the share of swapped rounds whose difference
    is at least the one seen, which counts as one of them (approximate randomisation, Noreen 1989).
    """
    size = len(next(iter(student.values())))
    generator = torch.Generator().manual_seed(seed)
    seen = _gap(task, student, teacher)
    if not math.isfinite(seen):
        return math.nan
    swaps = (torch.rand(size, generator=generator) < 0.5 for _ in range(rounds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extreme = sum(
            _gap(task, *_swapped(student, teacher, swap)) >= seen * (1 - ROUNDING) for swap in swaps
        )
    return (1 + extreme) / (1 + rounds)


def _gap(task: Task, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> float:
    return abs(task.quality(student)[task.primary] - task.quality(teacher)[task.primary])


def _swapped(
    student: dict[str, Tensor], teacher: dict[str, Tensor], swap: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def chosen(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(swap.view(-1, *[1] * (column.dim() - 1)), second[name], column)
            for name, column in first.items()
        }

    return chosen(student, teacher), chosen(teacher, student)
