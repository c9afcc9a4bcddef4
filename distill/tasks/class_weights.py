"""The key `loss.class_weights` -> a factor of the supervised loss for each class.

N = examples, C = classes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill.errors import UserError
from distill.tasks.labels import shorten


def in_order(weights: Any, names: Sequence[str]) -> list[float]:
    """Factors in the order of the names.

    Args:
        weights: `{name: factor}`, or a list in the order of the names.
        names: All labels.

    Raises:
        UserError: A name is missing or unknown, or there are more or fewer factors than names.
    """
    if not isinstance(weights, Mapping):
        weights = dict(zip(names, weights, strict=True)) if len(weights) == len(names) else weights
    if not isinstance(weights, Mapping):
        raise UserError(
            f"loss.class_weights is {list(weights)}, but the {len(names)} labels are "
            f"{shorten(names)}: give a factor for each in this order"
        )
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown or missing:
        fault = f"names {shorten(unknown)}" if unknown else f"leaves out {shorten(missing)}"
        raise UserError(
            f"loss.class_weights {fault}, but the labels are {shorten(names)}: "
            "give a factor for each of these"
        )
    return [float(weights[name]) for name in names]


def balanced_one_of_c(cells: Iterable[str | None], names: Sequence[str]) -> list[float]:
    """N / (C * examples of the class): every class has the same weight in all, 1 on average.

    Classes without examples do not count, and have the factor 1.
    """
    counts = Counter(cell for cell in cells if cell is not None)
    share = sum(counts.values()) / max(len(counts), 1)
    return [share / counts[name] if counts[name] else 1.0 for name in names]


def balanced_any_of_c(cells: Iterable[list[str] | None], names: Sequence[str]) -> list[float]:
    """Examples without a label / examples with it: both weigh the same.

    1 for labels that no example has, or all: 0 would leave these out of the loss.
    """
    sets = [cell for cell in cells if cell is not None]
    counts = Counter(name for cell in sets for name in cell)
    return [
        (len(sets) - counts[name]) / counts[name] if 0 < counts[name] < len(sets) else 1.0
        for name in names
    ]
