"""A column of messages -> conversations as text, which are stored by a hash of their content."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from distill import store
from distill.data.content_hash import fingerprint
from distill.data.encode_chunks import count_processes, map_chunks
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task

log = logging.getLogger(__name__)
VERSION = 1  # of the text of conversations: increment it to invalidate stored entries
FILE = "conversations.arrow"
TOOLS = "tools"  # the column that describes tools, if the source has it
CHUNK = 1000  # rows that are parsed at a time


class _RowError(Exception):
    """A cell that is no conversation: its row in the chunk, itself, and what it should be."""


def read_messages(split: Dataset, name: str, data: Data, task: Task) -> Dataset:
    """A split with its column of messages as strings, empty where a conversation is dropped.

    Args:
        split: The split of the source.
        name: Its name in the source.
        data: Names the column.
        task: Parses its cells.

    Raises:
        UserError: A cell is no conversation, or is refused.
    """
    cells, column = _cells(split, data)
    where = f"split {name} of {data.source}"
    key = {"version": VERSION, "split": fingerprint(cells), "task": task.identity()}
    entry = store.entry_path("conversations", key)
    if not store.is_intact(entry):
        with store.write_entry(entry) as folder:
            _write(folder / FILE, _parse(cells, column, where, task), column)
    texts = Dataset.from_file(str(entry / FILE))
    dropped = pc.sum(pc.equal(texts.data.column(0), "")).as_py()
    if dropped:
        log.info("%d of %d conversations in %s have no reply: dropped", dropped, len(texts), where)
    return texts


def parse_messages(rows: Dataset, name: str, data: Data, task: Task) -> Dataset:
    """The same for some rows of a stream: they are parsed in this process, and not stored.

    Raises:
        UserError: A cell is no conversation, or is refused.
    """
    cells, column = _cells(rows, data)
    try:
        return Dataset(_parse_chunk(cells.with_format(None)[:], column, task))
    except _RowError as error:
        _, shown, problem = error.args
        where = f"a row of split {name} of {data.source}"
        raise UserError(f"column {column!r} is {shown} in {where}, but {problem}") from error


def _cells(split: Dataset, data: Data) -> tuple[Dataset, str]:
    """The column of messages, perhaps beside that of tools, and its name."""
    if len(data.text) > 1:
        raise UserError(
            f"data.text is {list(data.text)}, but conversations with task.learn are one column: "
            "name the column of messages only"
        )
    columns = [each for each in (data.text[0], TOOLS) if each in split.column_names]
    return split.select_columns(columns), data.text[0]


def _parse_chunk(chunk: dict[str, list[Any]], column: str, task: Task) -> pa.Table:
    """The conversations of some rows."""
    texts = []
    tools = chunk.get(TOOLS) or [None] * len(chunk[column])
    for row, pair in enumerate(zip(chunk[column], tools, strict=True)):
        try:
            texts.append("" if pair[0] in (None, "") else task.parse_text(*pair))
        except ValueError as error:
            raise _RowError(row, f"{pair[0]!r:.80}", str(error)) from error
    return pa.table({column: pa.array(texts, pa.string())})


def _parse(cells: Dataset, column: str, where: str, task: Task) -> Iterator[pa.Table]:
    """The conversations, chunk by chunk; UserError with the row, from 0, of one that is wrong."""

    def parse(chunk: dict[str, list[Any]]) -> pa.Table:
        return _parse_chunk(chunk, column, task)

    first = 0
    try:
        for table in map_chunks(cells, parse, CHUNK, count_processes(len(cells))):
            yield table
            first += len(table)
    except _RowError as error:
        row, shown, problem = error.args
        raise UserError(
            f"column {column!r} of {where} is {shown} in row {first + row}, but {problem}"
        ) from error


def _write(path: Path, tables: Iterator[pa.Table], column: str) -> None:
    """Write an Arrow stream."""
    schema = Features({column: Value("string")}).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))
