"""Draws of two held-out sets in which classes are as frequent as among all examples.

The other examples are the training set, which keeps at least one example of each class.

N = examples, C = classes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

TRAIN, FIRST, SECOND = range(3)  # sets that an example may be assigned to
_UNASSIGNED = -1


def apportion(weights: np.ndarray, caps: np.ndarray, total: int, tie: np.ndarray) -> np.ndarray:
    """Divide `total` in proportion to weights, by largest remainder and within caps.

    Args:
        weights: At least 0.
        caps: Largest part of each; their sum is at least `total`.
        total: Sum of the parts.
        tie: Of equal remainders, the one with the largest `tie` is rounded up first.
    """
    exact = total * weights / max(weights.sum(), 1e-300)
    parts = np.minimum(np.floor(exact + 1e-9).astype(int), caps)
    while (missing := total - parts.sum()) > 0:
        below = np.flatnonzero(parts < caps)
        remainder = np.round((exact - parts)[below], 9)
        chosen = below[np.lexsort((-tie[below], -remainder))][:missing]
        parts[chosen] = np.minimum(parts[chosen] + max(1, missing // len(chosen)), caps[chosen])
    return parts


def draw_by_class(classes_N: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two disjoint sets of `size` examples, or fewer if the classes do not have them.

    Args:
        classes_N: The class of each example, from 0.
        size: Examples of each set.
        seed: Of the draw.

    Returns:
        Indices of the examples of both sets, sorted.
    """
    generator = np.random.default_rng(seed)
    counts_C = np.bincount(classes_N)
    room_C = np.maximum(counts_C - 1, 0)
    size = min(size, int(room_C.sum()) // 2)
    first_C = apportion(counts_C, room_C, size, generator.random(len(counts_C)))
    second_C = apportion(counts_C, room_C - first_C, size, generator.random(len(counts_C)))
    order_N = generator.permutation(len(classes_N))
    order_N = order_N[np.argsort(classes_N[order_N], kind="stable")]
    sorted_N = classes_N[order_N]
    rank_N = np.arange(len(order_N)) - (np.cumsum(counts_C) - counts_C)[sorted_N]
    is_first_N = rank_N < first_C[sorted_N]
    is_second_N = ~is_first_N & (rank_N < (first_C + second_C)[sorted_N])
    return np.sort(order_N[is_first_N]), np.sort(order_N[is_second_N])


class LabelSets(NamedTuple):
    """The classes of examples that may have any number of them, as compressed sparse rows."""

    classes: np.ndarray  # of example 0, then of example 1, ...
    starts_N: np.ndarray  # where those of each example start
    counts_N: np.ndarray  # how many each has
    number: int  # of all classes

    @classmethod
    def of(cls, sets: Iterable[Iterable[int]], number: int) -> "LabelSets":
        """From the classes of each example."""
        lists = [list(dict.fromkeys(each)) for each in sets]
        counts_N = np.fromiter(map(len, lists), int, len(lists))
        classes = np.fromiter((c for each in lists for c in each), int, int(counts_N.sum()))
        return cls(classes, np.cumsum(counts_N) - counts_N, counts_N, number)

    def frequencies(self, examples: np.ndarray) -> np.ndarray:
        """How many of these examples have each class, (C,)."""
        counts = self.counts_N[examples]
        first = np.repeat(self.starts_N[examples] - (np.cumsum(counts) - counts), counts)
        return np.bincount(
            self.classes[first + np.arange(int(counts.sum()))], minlength=self.number
        )

    def by_class(self, order_N: np.ndarray) -> list[np.ndarray]:
        """The examples of each class, in the order of `order_N`."""
        rank_N = np.empty_like(order_N)
        rank_N[order_N] = np.arange(len(order_N))
        owner = np.repeat(np.arange(len(order_N)), self.counts_N)
        order = np.lexsort((rank_N[owner], self.classes))
        ends = np.cumsum(np.bincount(self.classes, minlength=self.number))
        return np.split(owner[order], ends[:-1])


def draw_by_labels(labels: LabelSets, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two sets by iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011).

    The examples of the rarest class are divided first, then those of the class that has become the
    rarest. An example of each class is assigned to the training set before.

    Args:
        labels: The classes of each example.
        size: Examples of each set, or fewer if the classes do not have them.
        seed: Of the draw.

    Returns:
        Indices of the examples of both sets, sorted.
    """
    generator = np.random.default_rng(seed)
    order_N = generator.permutation(len(labels.counts_N))
    by_class = labels.by_class(order_N)
    reserved = _one_of_each(labels, by_class)
    size = min(size, (len(order_N) - len(reserved)) // 2)
    sets_N = np.full(len(order_N), _UNASSIGNED)
    sizes = np.array([len(order_N) - 2 * size, size, size])
    draw = _Draw(labels, sets_N, sizes)
    draw.assign(reserved, TRAIN)
    while (rarest := draw.rarest()) is not None:
        draw.divide(by_class[rarest], draw.missing_C3[rarest])
    draw.divide(order_N, draw.missing_3)
    movable = np.setdiff1d(order_N, reserved)
    return _of_size(sets_N, FIRST, size, movable), _of_size(sets_N, SECOND, size, movable)


class _Draw:
    """The examples that each set still lacks, by class and in all."""

    def __init__(self, labels: LabelSets, sets_N: np.ndarray, sizes: np.ndarray) -> None:
        self.labels, self.sets_N = labels, sets_N
        self.missing_3 = sizes.astype(float)
        self.remaining_C = np.bincount(labels.classes, minlength=labels.number)
        self.missing_C3 = self.remaining_C[:, None] * (sizes / max(sizes.sum(), 1))

    def assign(self, examples: np.ndarray, to: int) -> None:
        frequencies_C = self.labels.frequencies(examples)
        self.sets_N[examples] = to
        self.remaining_C -= frequencies_C
        self.missing_C3[:, to] -= frequencies_C
        self.missing_3[to] -= len(examples)

    def rarest(self) -> int | None:
        """The class with the fewest examples that are not assigned."""
        present = np.flatnonzero(self.remaining_C > 0)
        return int(present[self.remaining_C[present].argmin()]) if len(present) else None

    def divide(self, examples: np.ndarray, missing_3: np.ndarray) -> None:
        """Assign those of the examples that are in no set in proportion to what the sets lack."""
        examples = examples[self.sets_N[examples] == _UNASSIGNED]
        total = len(examples)
        share_3 = np.maximum(missing_3, 0)
        if not share_3.any():
            share_3 = np.array([1.0, 0.0, 0.0])
        parts = apportion(share_3, np.full(3, total), total, self.missing_3.copy())
        for to, part in enumerate(np.split(examples, np.cumsum(parts)[:-1])):
            self.assign(part, to)


def _one_of_each(labels: LabelSets, by_class: list[np.ndarray]) -> np.ndarray:
    """Examples that together have every class, a few more than necessary; rare classes first."""
    covered_C, chosen = np.zeros(labels.number, bool), []
    for number in np.argsort([len(examples) for examples in by_class], kind="stable"):
        if len(by_class[number]) and not covered_C[number]:
            example = by_class[number][0]
            start = labels.starts_N[example]
            covered_C[labels.classes[start : start + labels.counts_N[example]]] = True
            chosen.append(example)
    return np.array(chosen, dtype=int)


def _of_size(sets_N: np.ndarray, number: int, size: int, movable: np.ndarray) -> np.ndarray:
    """The examples of a set, after its surplus is moved to the training set, or from there."""
    drawn = movable[sets_N[movable] == number]
    spare = movable[sets_N[movable] == TRAIN][: max(0, size - len(drawn))]
    sets_N[drawn[size:]], sets_N[spare] = TRAIN, number
    return np.flatnonzero(sets_N == number)
