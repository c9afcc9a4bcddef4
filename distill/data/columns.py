"""The text and label columns of one split, checked."""

import logging
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from distill.data.label_column import InvalidLabelError, LabelColumn, add_column, read_column
from distill.data.message_column import parse_messages, read_messages
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
    cells: LabelColumn | None  # None if the task or the recipe uses no labels
    rows: np.ndarray  # indices of the rows that have a text

    def labelled_rows(self) -> np.ndarray:
        """Indices of the rows that have a text and, where there are labels, a label."""
        if self.cells is None:
            return self.rows
        return self.rows[self.cells.present[self.rows]]


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
    texts = read_texts(split, name, data, task)
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


def read_texts(
    split: Dataset, name: str, data: Data, task: Task, streamed: bool = False
) -> Dataset:
    """The text columns, as strings; some rows of a stream may have no text, and are not stored."""
    check_columns(split, name, data.text, data)
    if task.reads_messages:
        read = parse_messages if streamed else read_messages
        split = read(split, name, data, task)
    for column in data.text:
        if not streamed:
            _check_not_empty(split, name, column, data)
        dtype = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        if dtype not in ("string", "large_string", "null"):
            raise UserError(
                f"column {column!r} of split {name} of {data.source} holds {dtype}, but a text is "
                f"a string: {_not_a_text(task)}"
            )
    features = Features({column: Value("string") for column in data.text})
    texts = split.select_columns(list(data.text))
    return texts if texts.features == features else texts.cast(features)


def _not_a_text(task: Task) -> str:
    """The way out for a column of other values."""
    messages = "if it holds messages, set task.learn to assistant; otherwise "
    return f"{messages if task.predicts_tokens else ''}name another column in data.text"


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
    blank = blank_cells(texts)
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


def blank_cells(texts: Dataset) -> np.ndarray:
    """Whether each cell holds white space at most, (columns, rows)."""
    no_rows = np.empty((len(texts.column_names), 0), dtype=bool)
    tables = texts.with_format("arrow").iter(CHUNK)
    return np.concatenate(
        [no_rows, *(np.stack([_is_blank(column) for column in table.columns]) for table in tables)],
        axis=1,
    )


def _is_blank(column: pa.ChunkedArray) -> np.ndarray:
    """Whether each cell is empty or white space; an empty column of CSV is read as numbers."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.is_null(nan_is_null=True).to_numpy()
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()


def join_labels(split: Dataset, name: str, data: Data) -> Dataset:
    """A split in which several columns of 0 and 1 are one column of lists.

    An empty cell, or -1, leaves the example unlabelled.
    """
    if not isinstance(data.label, list):
        return split
    if data.label_column in split.column_names:
        raise UserError(
            f"data.label is {data.label}, whose columns become {data.label_column}, but split "
            f"{name} of {data.source} has a column of this name: rename it"
        )
    check_columns(split, name, data.label, data)
    columns = [_read_indicators(split, column, data) for column in data.label]
    missing = ~np.all([column.present for column in columns], axis=0)
    values = np.stack([np.array([*each.distinct, 0])[each.codes_N] for each in columns], axis=1)
    offsets = np.arange(len(split) + 1, dtype=np.int32) * len(columns)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values.astype(np.int8).ravel()), mask=pa.array(missing)
    )
    return add_column(split, str(data.label_column), lists, List(Value("int8")))


def _read_indicators(split: Dataset, column: str, data: Data) -> LabelColumn:
    """The 0 or 1 of each row, none where a cell is empty or hidden."""
    try:
        return read_column(split, column, _indicator)
    except InvalidLabelError as error:
        raise UserError(
            f"column {column!r} of {data.source} is {error.cell!r} in row {error.row}, but {error}"
        ) from error


def _indicator(cell: Any) -> int | None:
    if is_missing(cell) or cell == HIDDEN:
        return None
    key = cell.strip().casefold() if isinstance(cell, str) else cell
    value = INDICATORS.get(key) if isinstance(key, Hashable) else None
    if value is None:
        raise ValueError(
            "each of several label columns holds 0 and 1: correct it, or name other columns in "
            "data.label"
        )
    return value


def _read_labels(split: Dataset, name: str, data: Data, task: Task) -> LabelColumn:
    """The label column by name; UserError with the row, from 0, of an invalid label."""
    column = str(data.label_column)
    check_columns(split, name, [column], data)
    names = declared(split.features[column])
    try:
        return read_column(split, column, lambda cell: task.parse_label(cell, names))
    except InvalidLabelError as error:
        raise UserError(
            f"column {column!r} of split {name} of {data.source} is {error.cell!r} in row "
            f"{error.row}, but {error}"
        ) from error
