"""A hash of the content of a split, computed from Arrow's buffers."""

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

CHUNK = 1000  # rows that are hashed at a time


def fingerprint(split: Dataset) -> str:
    """SHA-256 of the columns' names, types and values, independent of how they are stored."""
    digest = hashlib.sha256(
        repr(sorted((name, str(feature)) for name, feature in split.features.items())).encode()
    )
    rows = split.with_format("arrow")
    for start in range(0, len(split), CHUNK):
        table: pa.Table = rows[start : start + CHUNK]
        for name in sorted(table.column_names):
            _add(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _add(digest: Any, column: pa.Array) -> None:
    """Hash which values there are, the lengths of lists and texts, and the values."""
    kind = column.type
    if isinstance(column, pa.ChunkedArray):  # of no chunk
        column = pa.array([], kind)
    digest.update(f"{len(column)} {column.null_count}".encode())
    if column.null_count:
        _add_buffer(digest, pc.cast(pc.is_valid(column), pa.uint8()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _add_buffer(digest, pc.cast(pc.fill_null(pc.list_value_length(column), 0), pa.int64()))
        _add(digest, column.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = pc.fill_null(column, "")
        _add_buffer(digest, pc.cast(pc.binary_length(texts), pa.int64()))
        _add_text(digest, texts)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        _add_buffer(digest, pc.fill_null(column, 0) if column.null_count else column)
    else:
        digest.update(repr(column.to_pylist()).encode())


def _add_buffer(digest: Any, numbers: pa.Array) -> None:
    digest.update(numbers.to_numpy(zero_copy_only=False).tobytes())


def _add_text(digest: Any, texts: pa.Array) -> None:
    texts = pc.cast(texts, pa.large_binary())
    _, offsets, content = texts.buffers()
    if len(texts) and content is not None:
        size = len(texts) + 1
        ends = pa.Array.from_buffers(pa.int64(), size, [None, offsets], offset=texts.offset)
        digest.update(memoryview(content)[ends[0].as_py() : ends[-1].as_py()])
