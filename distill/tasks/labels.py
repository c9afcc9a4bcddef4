"""Cells of a label column -> label names.

The recipe lists the names, or the column's type declares them, or they are the column's values.
A label's id is its index among the names.
"""

import ast
import json
import logging
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

import pyarrow as pa
from datasets import ClassLabel, Dataset

from distill.errors import UserError
from distill.recipe.config import Data

log = logging.getLogger(__name__)

HIDDEN = -1  # id of labels that a test set hides, a convention of data sets on the Hub
CHUNK = 10_000  # rows that are read at a time
MAX_SHOWN = 12  # names in a message


class Names(tuple[str, ...]):
    """Label names in the order of their ids, which are found in constant time."""

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self)}

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def index(self, name: str, *bounds: SupportsIndex) -> int:
        return super().index(name, *bounds) if bounds else self._ids[name]


@dataclass(frozen=True)
class Labels:
    """The labels of a task, as read from its data."""

    names: tuple[str, ...] = ()  # in the order of their ids; empty if labels have no names
    spread: float | None = None  # standard deviation of numbers; None if labels are names


def read_names(train: Dataset, data: Data) -> tuple[str, ...]:
    """Label names: `data.labels`, or those that the column's type declares, or its sorted values.

    Raises:
        UserError: There are no names, or a name occurs twice, or two of the column differ in white
            space or case only.
    """
    check_one_column(data)
    column = str(data.label)
    if data.labels is not None:
        names = tuple(data.labels)
    elif data.label is None:
        raise UserError(
            "data.label is null, but the model needs names for its classes: "
            "list them in data.labels"
        )
    else:
        check_no_objects(train, column)
        names = tuple(declared(train.features[column]) or _distinct(_cells(train, column), column))
        check_different(names, column)
    if len(set(names)) < len(names):
        raise UserError(
            f"data.labels is {shorten(names)}, but a name may occur only once: "
            "remove the repeated ones"
        )
    if not names:
        raise UserError(
            f"column {column!r} of the training split is empty and holds no label, but names are "
            "needed: name another column in data.label, or list the names in data.labels"
        )
    return names


def _cells(train: Dataset, column: str) -> Iterator[Any]:
    """The cells of a column, those of texts and integers once in each chunk."""
    for table in train.select_columns([column]).with_format("arrow").iter(CHUNK):
        cells = table.column(0)
        yield from (cells.unique() if has_recurring(cells.type) else cells).to_pylist()


def has_recurring(kind: pa.DataType) -> bool:
    """Whether cells of a type recur, and Arrow can compare them."""
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_boolean(kind)


def check_one_column(data: Data) -> None:
    """UserError if the recipe names several label columns."""
    if isinstance(data.label, list):
        raise UserError(
            f"data.label is {data.label}, but the task reads one column of labels: name one, "
            "or use distill.tasks.MultiLabelClassification, which takes a column of 0 and 1 "
            "for each label"
        )


def check_no_objects(train: Dataset, column: str) -> None:
    """UserError if a column holds objects with keys, or lists of lists or of objects."""
    feature = train.features[column]
    part = getattr(feature, "feature", feature)
    if isinstance(part, dict):
        kind = f"objects with the keys {shorten(part)}"
    elif part is not feature and hasattr(part, "feature"):
        kind = "lists of lists"
    else:
        return
    raise UserError(
        f"column {column!r} holds {kind}, but a label is a name or an integer: "
        "write each value into a column of its own, or choose another column as data.label"
    )


def check_different(names: Iterable[str], column: str) -> None:
    """UserError if two names of a column differ in white space or case only."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_normalized(name), name)
        if other != name:
            raise UserError(
                f"column {column!r} has the labels {other!r} and {name!r}, but labels that differ "
                "in white space or case only are hardly two classes: correct the cells, or list "
                "every label in data.labels to keep them apart"
            )


def _normalized(name: str) -> str:
    """A name without what cannot be seen: white space at its ends, case, forms of a character."""
    visible = "".join(
        c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf"
    )
    return " ".join(visible.split()).casefold()


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
        alike = [other for other in names if _normalized(other) == _normalized(name)]
        if alike:
            hint += f" (it differs from {alike[0]!r} in white space or case only)"
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
    """The names in a column: sorted texts and booleans, or integers in their order."""
    values = set()
    for cell in cells:
        if isinstance(cell, list | dict):
            raise UserError(
                f"column {column!r} holds {cell!r}, but a label must be a name or an integer: "
                "choose another column as data.label, or use "
                "distill.tasks.MultiLabelClassification for lists of names"
            )
        if not is_missing(cell):
            values.add(cell)
    if all(isinstance(value, str | bool) for value in values):
        return sorted(map(str, values))
    if not all(isinstance(value, int | float) and float(value).is_integer() for value in values):
        wrong = next(value for value in values if not isinstance(value, str))
        raise UserError(
            f"column {column!r} holds {wrong!r}, but labels must be names or integers: "
            "choose another column as data.label"
        )
    ids = sorted({int(value) for value in values})
    shown = [number for number in ids if number != HIDDEN]
    if shown == [*range(len(shown))]:
        if shown != ids:
            log.info("column %r holds %d in places: these examples have no label", column, HIDDEN)
        return [str(value) for value in shown]
    log.info(
        "column %r holds the numbers %s, which are the names of its labels", column, shorten(ids)
    )
    return [str(value) for value in ids]


def parse_list(cell: Any) -> Any:
    """The list that a string holds, as JSON or as Python prints it; other cells unchanged."""
    if not isinstance(cell, str) or not (
        cell.strip().startswith("[") and cell.strip().endswith("]")
    ):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(cell.strip())
        except (ValueError, SyntaxError):
            continue
        return parsed if isinstance(parsed, list) else cell
    return cell


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
