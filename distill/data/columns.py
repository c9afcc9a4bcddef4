"""The text and label columns of one split, checked."""

import logging
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task
from distill.tasks.labels import HIDDEN, declared, is_missing, shorten

log = logging.getLogger(__name__)
CHUNK = 1000  # rows that are read at a time
# The cells of a column of 0 and 1; True and 1.0 are equal to 1.
INDICATORS: dict[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}


class CheckedSplit(NamedTuple):
    """A split with all its rows, in the order of the source."""

    texts: Dataset  # the text columns
    cells: list[Any] | None  # labels by name; None if the task or the recipe uses no labels
    rows: np.ndarray  # indices of the rows that have a text

    def labelled_rows(self) -> np.ndarray:
        """Indices of the rows that have a text and, where there are labels, a label."""
        if self.cells is None:
            return self.rows
        present = np.fromiter((cell is not None for cell in self.cells), bool, len(self.cells))
        return self.rows[present[self.rows]]


def read_split(split: Dataset, name: str, data: Data, task: Task) -> CheckedSplit:
    """Read the columns that the recipe names.

    Args:
        split: The split of the source.
        name: Its name in the source.
        data: Names the columns.
        task: Parses the labels; bound to them.

    Raises:
        UserError: A column is missing or has another type, no row has a text, or a label is
            invalid.
    """
    texts = read_texts(split, name, data)
    has_labels = task.uses_labels and data.label is not None
    cells = _read_labels(split, name, data, task) if has_labels else None
    return CheckedSplit(texts, cells, rows_with_text(texts, f"split {name} of {data.source}"))


def check_columns(split: Dataset, name: str, columns: Iterable[str], data: Data) -> None:
    """UserError if a column is missing."""
    for column in columns:
        if column not in split.column_names:
            key = "data.text" if column in data.text else "data.label"
            raise UserError(
                f"{key} is {column}, but split {name} of {data.source} has the columns "
                f"{shorten(split.column_names)}: name one of them"
            )


def read_texts(split: Dataset, name: str, data: Data) -> Dataset:
    """The text columns, as strings."""
    check_columns(split, name, data.text, data)
    for column in data.text:
        _check_not_empty(split, name, column, data)
        dtype = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        if dtype not in ("string", "large_string", "null"):
            raise UserError(
                f"column {column!r} of split {name} of {data.source} holds {dtype}, but a text is "
                "a string: name another column in data.text"
            )
    features = Features({column: Value("string") for column in data.text})
    texts = split.select_columns(list(data.text))
    return texts if texts.features == features else texts.cast(features)


def _check_not_empty(split: Dataset, name: str, column: str, data: Data) -> None:
    """UserError if a column has no text in any row; where nothing is trained, a warning."""
    tables = split.select_columns([column]).with_format("arrow").iter(CHUNK)
    if not len(split) or not all(_is_blank(table.column(0)).all() for table in tables):
        return
    where = f"column {column!r} of split {name} of {data.source}"
    if name == data.train or len(data.text) == 1:
        raise UserError(
            f"{where} is empty: it has {len(split)} rows, but none of them has a text: "
            "name another column in data.text"
        )
    log.warning("%s is empty in all %d rows", where, len(split))


def rows_with_text(texts: Dataset, where: str) -> np.ndarray:
    """Indices of the rows that hold more than white space; UserError if there are none."""
    no_rows = np.empty((len(texts.column_names), 0), dtype=bool)
    tables = texts.with_format("arrow").iter(CHUNK)
    blank = np.concatenate(
        [no_rows, *(np.stack([_is_blank(column) for column in table.columns]) for table in tables)],
        axis=1,
    )
    empty = np.logical_and.reduce(blank)
    if empty.all():
        raise UserError(
            f"{where} has {len(texts)} rows, but none of them has a text: "
            "name another split or column"
        )
    half_empty = np.logical_or.reduce(blank) & ~empty
    if half_empty.any():
        log.info(
            "%d of %d pairs in %s have one empty side and are kept, the first in row %d",
            half_empty.sum(),
            len(texts),
            where,
            half_empty.argmax(),
        )
    if empty.any():
        log.info(
            "%d of %d examples in %s are empty and are dropped, the first in row %d",
            empty.sum(),
            len(texts),
            where,
            empty.argmax(),
        )
    return np.flatnonzero(~empty)


def _is_blank(column: pa.ChunkedArray) -> np.ndarray:
    """Whether each cell is empty or white space; an empty column of CSV is read as numbers."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.is_null(nan_is_null=True).to_numpy()
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()


def join_labels(split: Dataset, name: str, data: Data) -> Dataset:
    """A split in which several columns of 0 and 1 are one column of lists.

    An empty cell, or -1, leaves the example unlabelled.
    """
    if not isinstance(data.label, list) or data.label_column in split.column_names:
        return split
    check_columns(split, name, data.label, data)
    cells = [
        [_indicator(cell, column, row, data) for row, cell in enumerate(split[column])]
        for column in data.label
    ]
    lists = [None if None in row else list(row) for row in zip(*cells, strict=True)]
    return split.add_column(data.label_column, lists, feature=List(Value("int8")))


def _indicator(cell: Any, column: str, row: int, data: Data) -> int | None:
    """The 0 or 1 in a cell, None if it is empty or hidden."""
    if is_missing(cell) or cell == HIDDEN:
        return None
    value = INDICATORS.get(cell.strip().casefold() if isinstance(cell, str) else cell)
    if value is None:
        raise UserError(
            f"column {column!r} of {data.source} is {cell!r} in row {row}, but each of several "
            "label columns holds 0 and 1: correct it, or name other columns in data.label"
        )
    return value


def _read_labels(split: Dataset, name: str, data: Data, task: Task) -> list[Any]:
    """The label column by name; UserError with the row, from 0, of an invalid label."""
    column = str(data.label_column)
    check_columns(split, name, [column], data)
    names, labels = declared(split.features[column]), []
    cells = (cell for batch in split.select_columns([column]).iter(CHUNK) for cell in batch[column])
    for row, cell in enumerate(cells):
        try:
            label = task.parse_label(cell, names)
        except ValueError as error:
            raise UserError(
                f"column {column!r} of split {name} of {data.source} is {cell!r} in row {row}, "
                f"but {error}"
            ) from error
        # Interning stores each name once, not once per example.
        labels.append(sys.intern(label) if isinstance(label, str) else label)
    return labels
