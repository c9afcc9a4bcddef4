"""Metrics with 95 % bootstrap intervals, and a paired comparison of two models.

The same seed draws the same examples for every model, so that the draws of two models are paired:
their difference does not vary with how hard the drawn examples are.
"""

import math
import warnings
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.evaluate.records import Interval
from distill.tasks.base import Task

LEVEL = 0.95
NORMAL = NormalDist()
ROUNDING = 1e-9  # test statistics with a smaller relative difference count as equal

Columns = dict[str, Tensor]  # outcomes of all examples by name, see `Task.outcomes`


class Bootstrap(NamedTuple):
    """The metrics of a set of examples, and of sets drawn from it with replacement."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]  # by metric, (resamples,)

    def intervals(self) -> dict[str, Interval]:
        """Each metric with its interval."""
        return {
            metric: interval(value, self.draws[metric]) for metric, value in self.values.items()
        }


def bootstrap(task: Task, columns: Columns, resamples: int, seed: int) -> Bootstrap:
    """Compute the metrics of the examples and of `resamples` sets of the same size."""
    values = task.compute_metrics(columns)
    size = len(next(iter(columns.values())))
    draws = {metric: np.full(resamples, math.nan) for metric in values}
    with warnings.catch_warnings():
        # A resample may lack a class or have no variance: its metric is then NaN and left out.
        warnings.simplefilter("ignore")
        for number, index in enumerate(_draw(size, resamples, seed)):
            drawn = {name: column[index] for name, column in columns.items()}
            for metric, value in task.compute_metrics(drawn).items():
                if metric in draws:
                    draws[metric][number] = value
    return Bootstrap(values, draws)


def _draw(size: int, resamples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(size, (size,), generator=generator) for _ in range(resamples))


def interval(value: float, draws: np.ndarray) -> Interval:
    """The bias-corrected percentile interval (Efron 1981), widened to hold the value itself.

    The correction matters for metrics that resampling inflates, such as the calibration error,
    because a resample holds duplicates.
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
    """The 95 % interval of a share of `count` texts (Wilson 1927): [low, high].

    Unlike resampling, its width is not 0 if all of a few texts agree.
    """
    reach = NORMAL.inv_cdf((1 + LEVEL) / 2) ** 2 / count
    middle = (share + reach / 2) / (1 + reach)
    half = math.sqrt(reach * (share * (1 - share) + reach / 4)) / (1 + reach)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def difference(student: Bootstrap, teacher: Bootstrap, metric: str) -> Interval:
    """Student minus teacher, from draws of the same examples, resamples and seed."""
    return interval(
        student.values[metric] - teacher.values[metric],
        student.draws[metric] - teacher.draws[metric],
    )


def randomization_test(
    task: Task, student: Columns, teacher: Columns, rounds: int, seed: int
) -> float:
    """Two-sided p-value of the difference in the primary metric (Noreen 1989).

    Each round swaps the outcomes of the two models for a random half of the examples. p is the
    share of rounds, the original included, whose difference is at least the original one.
    """
    size = len(next(iter(student.values())))
    generator = torch.Generator().manual_seed(seed)
    observed = _difference(task, student, teacher)
    if not math.isfinite(observed):
        return math.nan
    swaps = (torch.rand(size, generator=generator) < 0.5 for _ in range(rounds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extreme = sum(
            _difference(task, *_swap(student, teacher, swap)) >= observed * (1 - ROUNDING)
            for swap in swaps
        )
    return (1 + extreme) / (1 + rounds)


def _difference(task: Task, student: Columns, teacher: Columns) -> float:
    """The absolute difference in the primary metric."""
    values = (task.compute_metrics(columns)[task.primary_metric] for columns in (student, teacher))
    return abs(next(values) - next(values))


def _swap(student: Columns, teacher: Columns, swap: Tensor) -> tuple[Columns, Columns]:
    """Exchange the examples for which `swap` is true."""

    def pick(first: Columns, second: Columns) -> Columns:
        return {
            name: torch.where(swap.view(-1, *[1] * (column.dim() - 1)), second[name], column)
            for name, column in first.items()
        }

    return pick(student, teacher), pick(teacher, student)
