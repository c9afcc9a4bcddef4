"""Cells of a label column -> label names. The data declare the names, or the recipe does; ids are places among them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from distill.errors import UserError
from distill.recipe.config import Data

HIDDEN = -1  # the Hub's convention for a label that is kept secret
CHUNK = 1000  # rows that are read at a time
SHOWN = 12  # names listed in a message


def read_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """`data.labels`, or the names that the column's type declares, or the sorted values of the column."""
    column = str(data.label)
    if data.labels is not None:
        names = tuple(data.labels)
    elif data.label is None:
        raise UserError(
            "data.label is null, but the model needs names for its classes: list them in data.labels"
        )
    else:
        cells = (
            cell for batch in train.select_columns([column]).iter(CHUNK) for cell in batch[column]
        )
        names = tuple(declared(train.features[column]) or _distinct(cells, column))
    if len(set(names)) < len(names):
        raise UserError(
            f"data.labels is {shorten(names)}, but a name may occur once only: drop the repetition"
        )
    if not names:
        raise UserError(
            f"column {column!r} of the training split holds no label, but names are needed: list them in data.labels"
        )
    return names


def declared(feature: Any) -> list[str] | None:
    """The names that a column's type declares, of one label or of lists of labels."""
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, ClassLabel) else None


def parse_label(cell: Any, names: Sequence[str], declared: Sequence[str] | None) -> str | None:
    """The name that a cell stands for: by itself, as an id, or None where it is empty or hidden.

    A whole number is an id, among the names that the column declares or else among `names`, unless these are whole numbers too.
    """
    if is_missing(cell) or (cell == HIDDEN and str(HIDDEN) not in names):
        return None
    if (
        isinstance(cell, float) and cell.is_integer()
    ):  # a column of whole numbers with empty cells reads as floats
        cell = int(cell)
    name = cell if isinstance(cell, str) else _by_id(cell, names, declared)
    if name not in names:
        hint = (
            ", 'yes' and 'no' in quotes" if {"True", "False"} & {*names} else ""
        )  # YAML takes them for truth values
        raise ValueError(
            f"the labels are {shorten(names)}: correct it, or list every label in data.labels{hint}"
        )
    return name


def _by_id(cell: Any, names: Sequence[str], declared: Sequence[str] | None) -> str:
    if isinstance(cell, bool):
        return str(cell)
    if not isinstance(cell, int):
        raise ValueError(
            "a label must be a name or a whole number: choose another column as data.label"
        )
    ids = declared if declared is not None else names
    if declared is None and all(_is_integer(name) for name in names):
        return str(cell)
    if not 0 <= cell < len(ids):
        raise ValueError(
            f"ids lie in 0..{len(ids) - 1} for the labels {shorten(ids)}: correct it, or list every label in data.labels"
        )
    return ids[cell]


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def shorten(names: Iterable[Any]) -> str:
    """Names for a message, the first of them where they are many."""
    names = list(names)
    return ", ".join(map(str, names[:SHOWN])) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )


def _distinct(cells: Iterable[Any], column: str) -> list[str]:
    """The names in a column: texts and truth values sorted; whole numbers must count from 0 without a gap."""
    values = {cell for cell in cells if not is_missing(cell)}
    if all(isinstance(value, str | bool) for value in values):
        return sorted(map(str, values))
    if not all(isinstance(value, int | float) and float(value).is_integer() for value in values):
        wrong = next(value for value in values if not isinstance(value, str))
        raise UserError(
            f"column {column!r} holds {wrong!r}, but labels must be names or whole numbers: choose another column as data.label"
        )
    ids = sorted({int(value) for value in values} - {HIDDEN})
    if ids != list(range(len(ids))):
        raise UserError(
            f"column {column!r} holds the numbers {shorten(ids)}, but numbers without names must count 0, 1, 2, ...: "
            f"list them as names in data.labels, such as {[str(value) for value in ids[:SHOWN]]}"
        )
    return [str(value) for value in ids]


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
