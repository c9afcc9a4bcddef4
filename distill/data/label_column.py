"""The labels of a split by name: each distinct one once, and its index for each row."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from datasets.fingerprint import generate_random_fingerprint

from distill.tasks.labels import has_recurring

CHUNK = 10_000  # rows that are read at a time
MISSING = -1  # index of a row without a label


class LabelColumn(Sequence[Any]):
    """Labels, of which each distinct one is stored once.

    Args:
        distinct: Names, lists of names, or numbers.
        codes_N: The index of each row's label among them, or MISSING.
    """

    def __init__(self, distinct: list[Any], codes_N: np.ndarray) -> None:
        self.distinct, self.codes_N = distinct, codes_N

    @classmethod
    def of(cls, labels: Sequence[Any]) -> Self:
        """From the label of each row, or None."""
        coder = Coder()
        return cls(coder.distinct, np.fromiter(map(coder.code, labels), np.int32, len(labels)))

    def __len__(self) -> int:
        return len(self.codes_N)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> Self: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return type(self)(self.distinct, self.codes_N[row])
        code = self.codes_N[row]
        return None if code == MISSING else self.distinct[code]

    def __iter__(self) -> Iterator[Any]:
        return (None if code == MISSING else self.distinct[code] for code in self.codes_N.tolist())

    @property
    def present(self) -> np.ndarray:
        """Whether each row has a label."""
        return self.codes_N != MISSING

    @property
    def kind(self) -> type | None:
        """str, list or float; None if there is no label."""
        return type(self.distinct[0]) if self.distinct else None

    def used(self, rows: np.ndarray) -> list[Any]:
        """The distinct labels of some rows."""
        codes = np.unique(self.codes_N[rows])
        return [self.distinct[code] for code in codes.tolist() if code != MISSING]

    def ordered(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The distinct names of some rows, sorted, and the index of each row's name among them."""
        codes, inverse = np.unique(self.codes_N[rows], return_inverse=True)
        names = [self.distinct[code] for code in codes.tolist()]
        order = sorted(range(len(names)), key=names.__getitem__)
        rank = np.empty(len(names), dtype=int)
        rank[order] = np.arange(len(names))
        return [names[number] for number in order], rank[inverse]

    def without(self, rows: np.ndarray) -> Self:
        """The same labels, but none in some rows."""
        codes_N = self.codes_N.copy()
        codes_N[rows] = MISSING
        return type(self)(self.distinct, codes_N)

    @property
    def feature(self) -> Any:
        """The type of a column that holds these labels."""
        if self.kind is list:
            return List(Value("string"))
        return Value("float64") if self.kind is float else Value("string")

    def to_arrow(self) -> pa.Array:
        """One value for each row."""
        kinds: dict[type | None, pa.DataType] = {
            list: pa.list_(pa.string()),
            float: pa.float64(),
        }
        kind = kinds.get(self.kind, pa.string())
        codes = pa.array(self.codes_N, mask=~self.present)
        return pa.array(self.distinct, kind).take(codes)


class Coder:
    """Numbers labels in the order in which they come; equal ones alike."""

    def __init__(self) -> None:
        self.distinct: list[Any] = []
        self._codes: dict[Hashable, int] = {}

    def code(self, label: Any) -> int:
        """The index of a label in `distinct`; MISSING for None."""
        if label is None:
            return MISSING
        if isinstance(label, float):  # seldom twice the same
            self.distinct.append(label)
            return len(self.distinct) - 1
        key = tuple(label) if isinstance(label, list) else label
        code = self._codes.setdefault(key, len(self.distinct))
        if code == len(self.distinct):
            self.distinct.append(label)
        return code


class InvalidLabelError(ValueError):
    """A cell that is no label, with its row; the message describes a valid one."""

    def __init__(self, cell: Any, row: int, rule: str) -> None:
        super().__init__(rule)
        self.cell, self.row = cell, row


def read_column(split: Dataset, column: str, parse: Callable[[Any], Any]) -> LabelColumn:
    """Parse a column of labels, each distinct value of a table once.

    Args:
        split: A split of the source.
        column: Its column.
        parse: Returns the label in a cell, or None; ValueError if it is none.

    Raises:
        InvalidLabelError: The first cell that is no label.
    """
    coder, start = Coder(), 0
    codes = [np.empty(0, np.int32)]
    for table in split.select_columns([column]).with_format("arrow").iter(CHUNK):
        cells, indices = distinct_cells(table.column(0))
        numbers = np.empty(len(cells), np.int32)
        for number, cell in enumerate(cells):
            try:
                numbers[number] = coder.code(parse(cell))
            except ValueError as error:
                row = start + int((indices == number).argmax())
                raise InvalidLabelError(cell, row, str(error)) from error
        codes.append(numbers[indices])
        start += len(indices)
    return LabelColumn(coder.distinct, np.concatenate(codes))


def distinct_cells(column: pa.ChunkedArray) -> tuple[list[Any], np.ndarray]:
    """The distinct cells in the order of their first rows, and the index of each row's cell."""
    if has_recurring(column.type):
        encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    return column.to_pylist(), np.arange(len(column))


def add_column(split: Dataset, name: str, values: pa.Array, feature: Any) -> Dataset:
    """A split with another column; a new fingerprint, because theirs pickles all values."""
    new = generate_random_fingerprint()
    return split.add_column(name, values, new_fingerprint=new, feature=feature)
