"""Raw examples -> encoded examples, tokenized once and cached by a hash of their content."""

import hashlib
import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value

from distill import store
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task

log = logging.getLogger(__name__)
VERSION = 3  # of the columns of `Task.encode`: increment it to invalidate stored entries
FILE = "examples.arrow"
CHUNK = 1000  # rows that are hashed or tokenized at a time
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
    return DatasetDict(
        {name: _encode(split, name, task, tokenizer, data) for name, split in raw.items()}
    )


def _encode(split: Dataset, name: str, task: Task, tokenizer: Any, data: Data) -> Dataset:
    entry = store.entry_path("examples", _key(split, task, tokenizer, data))
    if not store.is_intact(entry):
        with store.write_entry(entry) as folder:
            _write(split, task, tokenizer, data, folder / FILE)
    encoded = Dataset.from_file(str(entry / FILE))
    if len(encoded) == 0:
        raise UserError(
            f"the {name} split has {len(split)} texts, but none of them has a token to predict: "
            "name longer texts"
        )
    truncated = int(np.sum(encoded.with_format("numpy")["truncated"][:]))
    if truncated:
        log.info(
            "%d of %d texts of the %s split are longer than task.max_length, %d tokens: %s",
            truncated,
            len(split),
            name,
            task.max_length,
            "truncated" if task.uses_labels else "split into windows",
        )
    return encoded


def _key(split: Dataset, task: Task, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Everything that the encoded examples depend on."""
    return {
        "version": VERSION,
        "split": fingerprint(split),
        "tokenizer": _tokenizer_key(tokenizer),
        "task": task.identity(),
        "columns": [list(data.text), data.label],
    }


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


def fingerprint(split: Dataset) -> str:
    """SHA-256 of the columns' names, types and values, independent of how they are stored."""
    digest = hashlib.sha256(
        repr(sorted((name, str(feature)) for name, feature in split.features.items())).encode()
    )
    table = split.with_format("arrow")
    for start in range(0, len(split), CHUNK):
        rows = table[start : start + CHUNK].to_pydict()
        digest.update(repr(sorted(rows.items())).encode())
    return digest.hexdigest()


def _write(split: Dataset, task: Task, tokenizer: Any, data: Data, path: Path) -> None:
    function = partial(task.encode, tokenizer=tokenizer, data=data)
    split.with_format(None).map(
        function,
        batched=True,
        batch_size=CHUNK,
        remove_columns=split.column_names,
        features=_features(function(split[:1]), task),
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.parent.name,
        desc="tokenizing",
    )


def _features(columns: Iterable[str], task: Task) -> Features:
    return Features(
        {name: task.label_feature if name == "labels" else COLUMNS[name] for name in columns}
    )


def only_labelled(split: Dataset, task: Task) -> Dataset:
    """The encoded examples that have a label; UserError if there are none."""
    if not task.uses_labels:
        return split
    labels = np.asarray(split["labels"][:])
    missing = np.isnan(labels).any(-1) if labels.dtype.kind == "f" else labels < 0
    if missing.all():
        raise UserError(
            f"0 of {len(split)} training examples have a label, but this training needs labels: "
            "name their column in data.label, or a source that has them"
        )
    return split if not missing.any() else split.select(np.flatnonzero(~missing))
