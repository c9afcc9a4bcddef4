"""How a CSV or TSV file is written: its delimiter and quotes, and rows that a quote swallows."""

import bz2
import csv
import gzip
import logging
import lzma
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import UserError

log = logging.getLogger(__name__)

COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
DELIMITERS = (",", ";", "\t", "|")
SAMPLE = 200  # rows from which the delimiter is inferred
COMPARED = 10_000  # rows whose values are compared with the lines of a cell
FREE_LINES = 3  # complete rows in a cell that are too many if no column has recurring values
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
_DECIMAL_COMMA, _DECIMAL_POINT = re.compile(r"[+-]?\d+,\d+"), re.compile(r"[+-]?\d+\.\d+")
csv.field_size_limit(sys.maxsize)  # a text may be longer than the default of 131,072 characters


class Dialect(NamedTuple):
    """The format of a file, by the names of the arguments of csv.reader."""

    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    escapechar: str | None = None

    def reader(self, lines: Any, strict: bool = False) -> Any:
        """A csv.reader; `strict` refuses what follows a closing quote and is no delimiter."""
        return csv.reader(lines, strict=strict, **self._asdict())


class _Row(NamedTuple):
    """One row of a file."""

    first: int  # its first and last line, from 1
    last: int
    lines: list[str]
    cells: list[str]


def options(path: Path, default: str) -> dict[str, Any]:
    """Arguments of `pandas.read_csv` for a file.

    Args:
        path: A file of delimited rows with a header, perhaps compressed.
        default: The delimiter that the suffix of the file stands for.

    Raises:
        UserError: A row has more cells than the header, or a quote swallows rows.
    """
    dialect = Dialect(_infer_delimiter(path, default))
    alternatives = [dialect._replace(escapechar="\\")]
    if dialect.delimiter == "\t":
        alternatives.append(dialect._replace(quoting=csv.QUOTE_NONE))
    try:
        _check(path, dialect)
    except UserError:
        fitting = (each for each in alternatives if _fits(path, each))
        if (dialect := next(fitting, dialect)) not in alternatives:
            raise
    if dialect.quoting == csv.QUOTE_NONE:
        log.info("%s has quotes that do not enclose cells: they are part of the texts", path)
    return {
        "sep": dialect.delimiter,
        "quoting": dialect.quoting,
        "escapechar": dialect.escapechar,
        "decimal": _infer_decimal(path, dialect),
    }


def _fits(path: Path, dialect: Dialect) -> bool:
    try:
        _check(path, dialect)
    except UserError:
        return False
    return True


def _open(path: Path) -> Any:
    return COMPRESSIONS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="")


def _rows(path: Path, dialect: Dialect) -> Iterator[_Row]:
    """The rows that are not blank, each with its lines."""
    with _open(path) as file:
        lines: list[str] = []
        reader, last = dialect.reader(_recorded(file, lines)), 0
        for cells in reader:
            if cells:
                yield _Row(last + 1, reader.line_num, [*lines], cells)
            last = reader.line_num
            lines.clear()


def _recorded(lines: Any, record: list[str]) -> Iterator[str]:
    for line in lines:
        record.append(line)
        yield line


# ---- what the file uses


def _infer_delimiter(path: Path, default: str) -> str:
    """The delimiter in the header that splits all rows alike, or else the first in the header."""
    candidates = []
    for delimiter in (default, *(each for each in DELIMITERS if each != default)):
        widths = [len(row.cells) for row in islice(_rows(path, Dialect(delimiter)), SAMPLE)]
        if widths and widths[0] > 1:
            if set(widths) == {widths[0]}:
                return delimiter
            candidates.append(delimiter)
    return candidates[0] if candidates else default


def _infer_decimal(path: Path, dialect: Dialect) -> str:
    """A comma where numbers are written 0,5, as beside semicolons; else a point."""
    if dialect.delimiter == ",":
        return "."
    cells = [cell for row in islice(_rows(path, dialect), SAMPLE) for cell in row.cells]
    has_comma = any(_DECIMAL_COMMA.fullmatch(cell) for cell in cells)
    return "," if has_comma and not any(_DECIMAL_POINT.fullmatch(cell) for cell in cells) else "."


# ---- rows that are not what they seem


def _check(path: Path, dialect: Dialect) -> None:
    """Raise UserError where pandas would read something else than the rows of the file."""
    rows = _rows(path, dialect)
    header = next(rows, None)
    if header is None:
        return
    repeated = [cell for cell, count in Counter(header.cells).items() if cell and count > 1]
    if repeated:
        raise UserError(
            f"line {header.first} of {path} names the column {repeated[0]!r} more than once, but "
            "a recipe refers to columns by their names: rename one"
        )
    width, short, first_short = len(header.cells), 0, 0
    known: list[_Column] | None = None
    for row in rows:
        if len(row.cells) > width:
            raise UserError(
                f"line {row.first} of {path} has {len(row.cells)} cells, but its header has "
                f"{width}: enclose in quotes the texts that hold {_name(dialect.delimiter)}"
            )
        if len(row.cells) < width:
            short, first_short = short + 1, first_short or row.first
        if row.last > row.first:
            _check_quotes(path, dialect, row)
            known = known or _columns(path, dialect, width)
            _check_swallowed(path, dialect, row, known)
    if short:
        log.warning(
            "%d rows of %s have fewer cells than the header, the first in line %d: "
            "the others are taken as empty",
            short,
            path,
            first_short,
        )


def _name(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab"}.get(delimiter, delimiter)


def _check_quotes(path: Path, dialect: Dialect, row: _Row) -> None:
    """UserError if the quotes of a row of several lines do not enclose whole cells."""
    try:
        list(dialect.reader(row.lines, strict=True))
    except csv.Error as error:
        raise UserError(
            f"a quote in line {row.first} of {path} is closed in line {row.last}, or not at all, "
            f"but the closing quote of a cell must be its end, and {row.last - row.first} rows "
            "would vanish into one cell: enclose the whole cell in quotes and double those in it"
        ) from error


class _Column(NamedTuple):
    """The values of a column in rows of one line, if they recur or are numbers."""

    values: frozenset[str]
    numbers: bool

    @property
    def is_known(self) -> bool:
        return self.numbers or bool(self.values)

    def holds(self, cell: str) -> bool:
        return cell in self.values or (self.numbers and bool(_NUMBER.fullmatch(cell)))


def _columns(path: Path, dialect: Dialect, width: int) -> list[_Column]:
    rows = islice(_rows(path, dialect), 1, COMPARED)
    cells = [row.cells for row in rows if row.first == row.last and len(row.cells) == width]
    return [_column([row[index] for row in cells if row[index]]) for index in range(width)]


def _column(values: list[str]) -> _Column:
    distinct = frozenset(values)
    numbers = bool(values) and all(_NUMBER.fullmatch(value) for value in distinct)
    recurring = len(distinct) <= len(values) / 2
    return _Column(distinct if recurring else frozenset(), numbers)


def _check_swallowed(path: Path, dialect: Dialect, row: _Row, known: list[_Column]) -> None:
    """UserError if the lines of a cell are rows themselves."""
    for index, cell in enumerate(row.cells):
        first, *others = cell.splitlines() or [""]
        if not others or not _is_rest(dialect, first, index, known):
            continue
        *complete, last = others
        parts = [_split(dialect, line) for line in complete]
        start = _split(dialect, last)
        if any(len(cells) != len(known) for cells in parts) or len(start) != index + 1:
            continue
        # (column, cell) of every cell that the lines of a text would hardly have
        evidence = [*enumerate(_split(dialect, first)[1:], index + 1), *enumerate(start[:-1])]
        evidence += [pair for cells in parts for pair in enumerate(cells)]
        tested = [known[column].holds(cell) for column, cell in evidence if known[column].is_known]
        if all(tested) and (tested or len(complete) >= FREE_LINES):
            raise UserError(
                f"a cell of {path} extends from line {row.first} to {row.last}, but its lines are "
                "rows themselves: double or remove the quotes in these two lines, or write the "
                "file as JSON lines or Parquet"
            )


def _is_rest(dialect: Dialect, line: str, index: int, known: list[_Column]) -> bool:
    """Whether a line has as many cells as a row from this column on."""
    return len(_split(dialect, line)) == len(known) - index


def _split(dialect: Dialect, line: str) -> list[str]:
    return next(dialect.reader([line]), [])
