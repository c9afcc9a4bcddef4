"""Cells of a label column -> label names.

The recipe lists the names, or the column's type declares them, or they are the column's values.
A label's id is its index among the names.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from distill.errors import UserError
from distill.recipe.config import Data

HIDDEN = -1  # id of labels that a test set hides, a convention of data sets on the Hub
CHUNK = 1000  # rows that are read at a time
MAX_SHOWN = 12  # names in a message


@dataclass(frozen=True)
class Labels:
    """The labels of a task, as read from its data."""

    names: tuple[str, ...] = ()  # in the order of their ids; empty if labels have no names
    spread: float | None = None  # standard deviation of numbers; None if labels are names


def read_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """Label names: `data.labels`, or those that the column's type declares, or its sorted values.

    Raises:
        UserError: There are no names, or a name occurs twice.
    """
    column = str(data.label)
    if data.labels is not None:
        names = tuple(data.labels)
    elif data.label is None:
        raise UserError(
            "data.label is null, but the model needs names for its classes: "
            "list them in data.labels"
        )
    else:
        cells = (
            cell for batch in train.select_columns([column]).iter(CHUNK) for cell in batch[column]
        )
        names = tuple(declared(train.features[column]) or _distinct(cells, column))
    if len(set(names)) < len(names):
        raise UserError(
            f"data.labels is {shorten(names)}, but a name may occur only once: "
            "remove the repeated ones"
        )
    if not names:
        raise UserError(
            f"column {column!r} of the training split holds no label, but names are needed: "
            "list them in data.labels"
        )
    return names


def declared(feature: Any) -> list[str] | None:
    """Names that the type of a column declares, of one label or of lists of labels."""
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, ClassLabel) else None


def parse_label(cell: Any, names: Sequence[str], declared: Sequence[str] | None) -> str | None:
    """The name in a cell, or None if the cell is empty or the label hidden.

    An integer is an id among the names that the column declares, or else among `names`, unless
    these are integers themselves.

    Raises:
        ValueError: The cell is not a label; the message describes a valid one.
    """
    if is_missing(cell) or (cell == HIDDEN and str(HIDDEN) not in names):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # a column of integers with empty cells is read as floats
    name = cell if isinstance(cell, str) else _name_of_id(cell, names, declared)
    if name not in names:
        # YAML reads yes and no as booleans.
        hint = ", 'yes' and 'no' in quotes" if {"True", "False"} & {*names} else ""
        raise ValueError(
            f"the labels are {shorten(names)}: correct it, or list every label in data.labels{hint}"
        )
    return name


def _name_of_id(cell: Any, names: Sequence[str], declared: Sequence[str] | None) -> str:
    if isinstance(cell, bool):
        return str(cell)
    if not isinstance(cell, int):
        raise ValueError(
            "a label must be a name or an integer: choose another column as data.label"
        )
    ids = declared if declared is not None else names
    if declared is None and all(_is_integer(name) for name in names):
        return str(cell)
    if not 0 <= cell < len(ids):
        raise ValueError(
            f"ids lie in 0..{len(ids) - 1} for the labels {shorten(ids)}: "
            "correct it, or list every label in data.labels"
        )
    return ids[cell]


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def shorten(names: Iterable[Any]) -> str:
    """Names for a message, at most MAX_SHOWN of them."""
    names = list(names)
    rest = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(str, names[:MAX_SHOWN])) + rest


def _distinct(cells: Iterable[Any], column: str) -> list[str]:
    """The names in a column: sorted texts and booleans, or integers that count from 0."""
    values = {cell for cell in cells if not is_missing(cell)}
    if all(isinstance(value, str | bool) for value in values):
        return sorted(map(str, values))
    if not all(isinstance(value, int | float) and float(value).is_integer() for value in values):
        wrong = next(value for value in values if not isinstance(value, str))
        raise UserError(
            f"column {column!r} holds {wrong!r}, but labels must be names or integers: "
            "choose another column as data.label"
        )
    ids = sorted({int(value) for value in values} - {HIDDEN})
    if ids != list(range(len(ids))):
        raise UserError(
            f"column {column!r} holds the numbers {shorten(ids)}, but numbers without names must "
            "count 0, 1, 2, ...: list them as names in data.labels, such as "
            f"{[str(value) for value in ids[:MAX_SHOWN]]}"
        )
    return [str(value) for value in ids]


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
