"""Metrics with 95 % bootstrap intervals, and a paired comparison of two models.

The same seed draws the same examples for every model, so that the draws of two models are paired:
their difference does not vary with how hard the drawn examples are.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.evaluate.records import Interval
from distill.tasks.base import Task

LEVEL = 0.95
NORMAL = NormalDist()
MOST_SETS, MOST_WEIGHTS = 100, 1 << 21  # resamples, and their weights, at a time
ROUNDING = 1e-9  # statistics with a smaller difference count as equal

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
    drawn = _metrics_of_draws(task, columns, _draw(size, resamples, seed))
    unknown = np.full(resamples, math.nan)
    return Bootstrap(values, {metric: drawn.get(metric, unknown) for metric in values})


def _draw(size: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each example is drawn, (N,), for each resample."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(size, (size,), generator=generator).bincount(minlength=size)


def _metrics_of_draws(
    task: Task, columns: Columns, counts: Iterable[Tensor]
) -> dict[str, np.ndarray]:
    """The metrics of sets of examples, NaN where a set lacks what they need.

    Args:
        task: Computes them.
        columns: Outcomes of all examples.
        counts: How often each example is in a set, (N,), for each set.
    """
    if not task.has_weighted_metrics():
        return _join_draws(
            {name: np.array([value]) for name, value in metrics.items()}
            for metrics in (_repeated_metrics(task, columns, count_N) for count_N in counts)
        )
    size = len(next(iter(columns.values())))
    sets = min(MOST_SETS, max(1, MOST_WEIGHTS // max(1, size)))
    return _join_draws(
        {name: value.numpy() for name, value in task.weighted_metrics(columns, weights_NR).items()}
        for weights_NR in _in_groups(counts, sets)
    )


def _repeated_metrics(task: Task, columns: Columns, count_N: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():
        # A resample may lack a class or have no variance: its metric is then NaN and left out.
        warnings.simplefilter("ignore")
        repeated = {name: column.repeat_interleave(count_N, 0) for name, column in columns.items()}
        return task.compute_metrics(repeated)


def _in_groups(counts: Iterable[Tensor], sets: int) -> Iterator[Tensor]:
    """Several sets at a time, as weights (N, R)."""
    remaining = iter(counts)
    while group := list(islice(remaining, sets)):
        yield torch.stack(group, 1).double()


def _join_draws(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The metrics of all sets, (R,), NaN for sets that lack a metric."""
    collected = list(parts)
    sizes = [len(next(iter(part.values()))) for part in collected]
    names = dict.fromkeys(name for part in collected for name in part)
    return {
        name: np.concatenate(
            [
                part.get(name, np.full(size, math.nan))
                for part, size in zip(collected, sizes, strict=True)
            ]
        )
        for name in names
    }


def interval(value: float, draws: np.ndarray) -> Interval:
    """The bias-corrected percentile interval (Efron 1981), widened to hold the value itself.

    The correction matters for metrics that resampling inflates, such as the calibration error,
    because a resample holds duplicates.
    """
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(draws) == 0:
        return Interval(value, math.nan, math.nan)
    equal = np.isclose(draws, value, rtol=ROUNDING, atol=ROUNDING)
    below = float(np.mean((draws < value) & ~equal) + np.mean(equal) / 2)
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
    observed = abs(_primary(task, student) - _primary(task, teacher))
    if not math.isfinite(observed):
        return math.nan
    both = {name: torch.cat([column, teacher[name]]) for name, column in student.items()}
    first, second = (
        _metrics_of_draws(task, both, _halves(size, rounds, seed, swap))[task.primary_metric]
        for swap in (True, False)
    )
    extreme = np.sum(np.abs(first - second) >= observed * (1 - ROUNDING))
    return (1 + int(extreme)) / (1 + rounds)


def _primary(task: Task, columns: Columns) -> float:
    return task.compute_metrics(columns)[task.primary_metric]


def _halves(size: int, rounds: int, seed: int, swap: bool) -> Iterator[Tensor]:
    """One outcome of each example, of one model or of the other, as counts of (2N,)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        second_N = (torch.rand(size, generator=generator) < 0.5) == swap
        yield torch.cat([~second_N, second_N]).long()
