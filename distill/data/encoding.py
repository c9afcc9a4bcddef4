"""Raw examples -> token ids, once: store entries addressed by their content, that a later run maps into memory."""

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
VERSION = 2  # of what `Task.encode` returns: raise it when that changes, and no older file is used
FILE = "examples.arrow"
CHUNK = 1000  # rows that are hashed or tokenised at a time
COLUMNS = {
    "input_ids": List(Value("int32")),
    "token_type_ids": List(Value("int8")),
    "size": Value("int32"),
    "length": Value("int32"),
    "rows": Value("int32"),
    "cut": Value("int8"),
    "begins": Value("int8"),
}


def encode(raw: DatasetDict, task: Task, tokenizer: Any, data: Data) -> DatasetDict:
    """Every split tokenised, from the store where it has been done before."""
    return DatasetDict(
        {name: _encode(split, name, task, tokenizer, data) for name, split in raw.items()}
    )


def _encode(split: Dataset, name: str, task: Task, tokenizer: Any, data: Data) -> Dataset:
    entry = store.entry_path("examples", _ingredients(split, task, tokenizer, data))
    if not store.is_intact(entry):
        with store.write_entry(entry) as inside:
            _write(split, task, tokenizer, data, inside / FILE)
    encoded = Dataset.from_file(str(entry / FILE))
    if len(encoded) == 0:
        raise UserError(
            f"the {name} split has {len(split)} texts, but none of them holds a token to predict: name longer texts"
        )
    cut = int(np.sum(encoded.with_format("numpy")["cut"][:]))
    if cut:
        fate = "shortened to it" if task.uses_labels else "cut into windows of it"
        log.info(
            "%d of %d texts of the %s split are longer than task.max_length, %d tokens: %s",
            cut,
            len(split),
            name,
            task.max_length,
            fate,
        )
    return encoded


def _ingredients(split: Dataset, task: Task, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Everything that the encoded examples depend on."""
    return {
        "version": VERSION,
        "split": fingerprint(split),
        "tokenizer": _tokenizer(tokenizer),
        "task": task.identity(),
        "columns": [list(data.text), data.label],
    }


def _tokenizer(tokenizer: Any) -> list[Any]:
    """What decides the tokenizer's answers. How it last cut and padded is part of its state, but not of that."""
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
    """SHA-256 of the columns' names, types and values, wherever and however they are stored."""
    digest = hashlib.sha256(
        repr(sorted((name, str(feature)) for name, feature in split.features.items())).encode()
    )
    table = split.with_format("arrow")
    for start in range(0, len(split), CHUNK):
        rows = table[start : start + CHUNK].to_pydict()
        digest.update(repr(sorted(rows.items())).encode())
    return digest.hexdigest()


def _write(split: Dataset, task: Task, tokenizer: Any, data: Data, path: Path) -> None:
    """Tokenise into a file, from which it is then mapped into memory."""
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
        desc="tokenising",
    )


def _features(columns: Iterable[str], task: Task) -> Features:
    return Features(
        {name: task.label_feature if name == "labels" else COLUMNS[name] for name in columns}
    )


def only_labelled(split: Dataset, task: Task) -> Dataset:
    """The encoded examples that have a label: what a teacher is fine-tuned on."""
    if not task.uses_labels:
        return split
    labels = np.asarray(split["labels"][:])
    hidden = np.isnan(labels).any(-1) if labels.dtype.kind == "f" else labels < 0
    if hidden.all():
        raise UserError(
            f"0 of {len(split)} training examples have a label, but labels are what is learned from here: "
            "name their column in data.label, or a source that has them"
        )
    return split if not hidden.any() else split.select(np.flatnonzero(~hidden))
