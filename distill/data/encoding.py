"""Raw examples -> encoded examples, tokenized once and cached by a hash of their content."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.utils import tqdm

from distill import store
from distill.data.content_hash import fingerprint
from distill.data.encode_chunks import count_processes, map_chunks
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import SHORTENED, SPLIT, TURNS, Task

log = logging.getLogger(__name__)
VERSION = 4  # of the columns of `Task.encode`: increment it to invalidate stored entries
FILE = "examples.arrow"
CHUNK = 1000  # rows that are tokenized at a time
COLUMNS = {
    "input_ids": List(Value("int32")),
    "token_type_ids": List(Value("int8")),
    "size": Value("int32"),
    "length": Value("int32"),
    "rows": Value("int32"),
    "truncated": Value("int8"),
    "first_window": Value("int8"),
}


def encode(raw: DatasetDict, task: Task, tokenizer: Any, data: Data) -> DatasetDict:
    """Tokenize every split, or load it from the store if it was tokenized before.

    Args:
        raw: Splits as :func:`distill.data.load` returns them.
        task: Bound to the labels of the data.
        tokenizer: Encodes the texts.
        data: Names the columns.

    Returns:
        The same splits with the columns of :meth:`distill.tasks.Task.encode`, memory-mapped.
    """
    key = _key(task, tokenizer, data)
    return DatasetDict(
        {name: _encode(split, name, key, task, tokenizer, data) for name, split in raw.items()}
    )


def _encode(
    split: Dataset, name: str, key: dict[str, Any], task: Task, tokenizer: Any, data: Data
) -> Dataset:
    entry = store.entry_path("examples", key | {"split": fingerprint(split)})
    if not store.is_intact(entry):
        with store.write_entry(entry) as folder:
            _write(split, task, tokenizer, data, folder / FILE)
    encoded = Dataset.from_file(str(entry / FILE))
    if len(encoded) == 0:
        raise UserError(
            f"the {name} split has {len(split)} texts, but none of them has a token to predict: "
            "name longer texts"
        )
    _log_truncated(encoded, name, len(split), task)
    if task.reads_messages:
        _log_predicted(encoded, name, len(split))
    return encoded


def _log_predicted(encoded: Dataset, name: str, texts: int) -> None:
    """Count the predicted tokens, and the conversations without any."""
    columns = encoded.select_columns(["rows", "length", "first_window"]).with_format("numpy")[:]
    rows, tokens = (int(columns[each].sum(dtype=np.int64)) for each in ("rows", "length"))
    log.info("%d of %d tokens of the %s split are predicted", rows, tokens, name)
    dropped = texts - int(columns["first_window"].sum(dtype=np.int64))
    if dropped:
        log.info(
            "%d of %d conversations of the %s split have no token to predict", dropped, texts, name
        )


def _log_truncated(encoded: Dataset, name: str, texts: int, task: Task) -> None:
    """Count the texts that were too long, by what was done to them."""
    truncated = encoded.with_format("numpy")["truncated"][:]
    kinds = {
        SPLIT: ("texts", "truncated" if task.uses_labels else "split into windows"),
        SHORTENED: ("prompts with their completions", "the prompts lose their beginning"),
        TURNS: ("conversations", "they are cut at turns"),
    }
    for kind, (parts, outcome) in kinds.items():
        count = int(np.sum((truncated & kind) > 0))
        if count:
            log.info(
                "%d of %d %s of the %s split are longer than task.max_length, %d tokens: %s",
                count,
                texts,
                parts,
                name,
                task.max_length,
                outcome,
            )


def _key(task: Task, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Everything that the encoded examples depend on, besides the split."""
    return {
        "version": VERSION,
        "tokenizer": _tokenizer_key(tokenizer),
        "task": task.identity(),
        "columns": [list(data.text), data.label],
    } | ({"template": tokenizer.chat_template} if task.reads_messages else {})


def _tokenizer_key(tokenizer: Any) -> list[Any]:
    """The state that a tokenizer's outputs depend on, without settings left from its last call."""
    state: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {
            "truncation": None,
            "padding": None,
        }
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return [
        type(tokenizer).__name__,
        json.dumps(state, sort_keys=True),
        special,
        tokenizer.model_input_names,
        tokenizer.truncation_side,
    ]


def _write(split: Dataset, task: Task, tokenizer: Any, data: Data, path: Path) -> None:
    """Write the encoded examples as an Arrow stream, chunk by chunk."""
    first = task.encode(split.with_format(None)[:1], tokenizer, data)
    schema = _features(first, task).arrow_schema

    def encode(examples: dict[str, list[Any]]) -> pa.Table:
        return pa.table(task.encode(examples, tokenizer, data), schema=schema)

    tables = map_chunks(split, encode, CHUNK, count_processes(len(split)))
    bar = tqdm(total=len(split), desc="tokenizing", unit=" examples", delay=1)
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table, max_chunksize=CHUNK)
            bar.update(CHUNK)


def _features(columns: Iterable[str], task: Task) -> Features:
    return Features(
        {name: task.label_feature if name == "labels" else COLUMNS[name] for name in columns}
    )


def only_labelled(split: Dataset, task: Task) -> Dataset:
    """The encoded examples that have a label; UserError if there are none."""
    rows = labelled_rows(split, task)
    if len(rows) == 0:
        raise UserError(
            f"0 of {len(split)} training examples have a label, but this training needs labels: "
            "name their column in data.label, or a source that has them"
        )
    return split if len(rows) == len(split) else split.select(rows)


def labelled_rows(split: Dataset, task: Task) -> np.ndarray:
    """Indices of the encoded examples that have a label; all if the task uses none.

    A label is an id of at least 0, numbers of which none is NaN, or ids of which one is at least 0.
    """
    if not task.uses_labels:
        return np.arange(len(split))
    column = split.select_columns(["labels"]).with_format("arrow")[:]["labels"].combine_chunks()
    rows, values = np.arange(len(split)), column
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        rows, values = pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column)
    numbers = values.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(values.type):
        return np.setdiff1d(rows, rows[np.isnan(numbers)])
    return np.unique(rows[numbers >= 0])
