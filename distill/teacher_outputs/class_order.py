"""Whether predictions agree with labels, or would if the classes came in another order.

A statistic t = sum(d) / s, of one term d for each example, has P(t > a) <= exp(-a^2 / 2) if s^2 is
the sum of d^2 and each term is as likely to be negative as positive: signs decide, whatever the
sizes (Efron 1969). s^2 is at least the variance of sum(d) for predictions that know nothing of the
labels, because the terms of rare classes are skewed.

N = examples, C = classes.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from distill.teacher_outputs.assignment import best_assignment

LEVEL = 0.999  # probability that a test does not refuse a teacher by chance
LOG_ERROR = math.log(1 - LEVEL)
# Of more classes too few examples each are compared to tell another order from chance, and the
# assignment takes time with their cube.
MOST_ORDERED = 1000


class Agreement(NamedTuple):
    """How predictions agree with labels, compared with predictions that know nothing of them."""

    above_chance: bool  # beyond the interval
    below_chance: bool
    order: tuple[int, ...]  # class of the labels that each predicted class agrees with best
    reordered: bool  # whether another order than 0, 1, 2, ... agrees better, beyond the interval


def class_agreement(predicted_NC: Tensor, labels_NC: Tensor) -> Agreement:
    """Compare predicted with true classes.

    Args:
        predicted_NC: 1 for a predicted class, or the probability of each class.
        labels_NC: 1 for the true classes, else 0.
    """
    predicted, labels = predicted_NC.double().numpy(), labels_NC.double().numpy()
    surprise_NC = labels - labels.mean(0)  # 0 on average for a prediction that knows nothing
    statistic = _statistic(predicted, surprise_NC)
    order = list(range(predicted.shape[1]))
    best = best_assignment(predicted.T @ surprise_NC) if len(order) <= MOST_ORDERED else order
    for cycle in _cycles(best):
        targets = [best[source] for source in cycle]
        gain_NC = np.zeros_like(predicted)
        gain_NC[:, targets] = predicted[:, cycle]
        gain_NC[:, cycle] -= predicted[:, cycle]
        if is_significant(_statistic(gain_NC, surprise_NC), _log_cycles(len(order), len(cycle))):
            for source, target in zip(cycle, targets, strict=True):
                order[source] = target
    return Agreement(
        is_significant(statistic),
        is_significant(-statistic),
        tuple(order),
        order != sorted(order),
    )


def number_agreement(predicted_N: Tensor, labels_N: Tensor) -> Agreement:
    """Compare predicted with true numbers by their covariance; there are no classes to reorder."""
    predicted, labels = predicted_N.double().numpy(), labels_N.double().numpy()
    centred_N1, surprise_N1 = (each[:, None] - each.mean() for each in (predicted, labels))
    statistic = _statistic(centred_N1, surprise_N1)
    return Agreement(is_significant(statistic), is_significant(-statistic), (0,), False)


def is_off_scale(predicted_N: Tensor, labels_N: Tensor) -> bool:
    """Whether numbers have a larger squared error than their mean label would, significantly."""
    predicted, labels = predicted_N.double().numpy(), labels_N.double().numpy()
    excess_N = (predicted - labels) ** 2 - (labels - labels.mean()) ** 2
    return is_significant(float(excess_N.sum() / np.sqrt(np.square(excess_N).sum() or 1.0)))


def _statistic(weights_NC: np.ndarray, surprise_NC: np.ndarray) -> float:
    """t for d = the sum of surprises with these weights; 0 if all terms are 0."""
    terms_N = (weights_NC * surprise_NC).sum(1)
    examples, classes = surprise_NC.shape
    if classes <= MOST_ORDERED:
        covariance_CC = surprise_NC.T @ surprise_NC / max(examples, 1)
        variance = float(((weights_NC @ covariance_CC) * weights_NC).sum())
    else:  # the same sum without a matrix of classes by classes
        variance = float(np.square(weights_NC @ surprise_NC.T).sum()) / max(examples, 1)
    scale = math.sqrt(max(float(np.square(terms_N).sum()), variance))
    return float(terms_N.sum()) / scale if scale > 0 else 0.0


def is_significant(statistic: float, log_tests: float = 0.0) -> bool:
    """Whether t is above 0 beyond the interval, as the largest of exp(log_tests) tests."""
    return statistic > 0 and log_tests - statistic**2 / 2 < LOG_ERROR


def _log_cycles(classes: int, length: int) -> float:
    """Logarithm of the number of cycles of a length, times the number of lengths."""
    return (
        math.lgamma(classes + 1)
        - math.lgamma(classes - length + 1)
        - math.log(length)
        + math.log(max(classes - 1, 1))
    )


def _cycles(order: list[int]) -> list[list[int]]:
    """The cycles of a permutation, each as an element, its image, the image of that, ..."""
    remaining, cycles = set(range(len(order))), []
    while remaining:
        cycle = [min(remaining)]
        while order[cycle[-1]] != cycle[0]:
            cycle.append(order[cycle[-1]])
        remaining -= set(cycle)
        if len(cycle) > 1:
            cycles.append(cycle)
    return cycles
