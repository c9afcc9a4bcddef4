"""A source -> the splits train, validation and test, checked and with labels by name."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, concatenate_datasets

from distill.data.columns import (
    CheckedSplit,
    check_columns,
    join_labels,
    read_split,
    read_texts,
    rows_with_text,
)
from distill.data.holdout import hold_out, keep_labels
from distill.data.label_column import LabelColumn, add_column
from distill.data.sources import open_source
from distill.data.streams import open_stream
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task
from distill.tasks.labels import shorten

log = logging.getLogger(__name__)
CHUNK = 1000  # rows that are hashed at a time


def load(data: Data, task: Task, seed: int) -> tuple[DatasetDict, Task]:
    """Load the raw examples of a recipe, and bind its task to their labels.

    Args:
        data: The recipe's section `data`.
        task: Parses the label column.
        seed: Seed for the choice of the `data.labelled` examples that stay labelled. Held-out
            splits do not depend on it.

    Returns:
        The splits train, validation and test, with the columns `data.text` and `data.label` (label
        names, or None where an example is unlabelled), and the bound task, a copy.

    Raises:
        UserError: The data do not fit the recipe.
    """
    _check_distinct(data)
    source: Mapping[str, Dataset]
    if data.streaming:  # the first rows stand for the training split
        _, source = open_stream(data, seed)
        data = replace(data, train="train", validation="validation", test="test")
    else:
        source = open_source(data.source, data.config)
    labels = data.label_column if task.uses_labels else None
    task, parts = _read_splits(source, data, task)
    rows, train = hold_out(parts, data), parts["train"]
    if data.labelled is not None:
        cells = keep_labels(train, rows["train"], data.labelled, seed, data)
        train = parts["train"] = train._replace(cells=cells)
    splits = DatasetDict(
        {role: _select(parts.get(role, train), chosen, labels) for role, chosen in rows.items()}
    )
    labelled = {role: parts.get(role, train).cells for role in rows}
    _warn_of_missing_labels(task, labelled, rows, data)
    if data.unlabelled is not None:
        unlabelled = _load_unlabelled(source, data, task, splits["train"].features)
        splits["train"] = concatenate_datasets([splits["train"], unlabelled])
    _warn_of_overlap(splits, data)
    return splits, task


def _read_splits(
    source: Mapping[str, Dataset], data: Data, task: Task
) -> tuple[Task, dict[str, CheckedSplit]]:
    """The bound task, and the splits that the recipe names, checked, by role."""
    names = _named_splits(data)
    splits = {role: _find_split(source, name, f"data.{role}", data) for role, name in names.items()}
    if task.uses_labels and data.label is not None:
        splits = {role: join_labels(split, names[role], data) for role, split in splits.items()}
        check_columns(splits["train"], data.train, [str(data.label_column)], data)
    task = task.with_labels(task.read_labels(splits["train"], data))
    return task, {
        role: _check_split(splits[role], name, f"data.{role}", data, task)
        for role, name in names.items()
    }


def texts(split: Dataset, columns: Iterable[str]) -> Iterator[str]:
    """The texts of a split, column by column, without empty ones."""
    return (text for column in columns for text in split[column] if text)


def _named_splits(data: Data) -> dict[str, str]:
    """The splits that the recipe names, by role; the others are held out of the training split."""
    names = {"train": data.train, "validation": data.validation, "test": data.test}
    return {role: name for role, name in names.items() if name is not None}


def _check_distinct(data: Data) -> None:
    """UserError if a split has two uses: a model must not be evaluated on its training data."""
    uses: dict[str, str] = {}
    for key, name in (*_named_splits(data).items(), ("unlabelled", data.unlabelled)):
        if name in uses:
            raise UserError(
                f"data.{key} is {name}, but data.{uses[name]} is that split too: "
                f"name another, or set data.{key} to null"
            )
        if name is not None:
            uses[name] = key


def _find_split(source: Mapping[str, Dataset], name: str, key: str, data: Data) -> Dataset:
    if name not in source:
        hold_out = ", or null to hold examples out of the training split"
        raise UserError(
            f"{key} is {name}, but {data.source} has the splits {shorten(source)}: "
            f"name one of them{'' if key == 'data.train' else hold_out}"
        )
    return source[name]


def _check_split(split: Dataset, name: str, key: str, data: Data, task: Task) -> CheckedSplit:
    part = read_split(split, name, data, task)
    if key != "data.train" and len(part.labelled_rows()) == 0:
        raise UserError(
            f"{key} is {name}, but none of its examples has a label: "
            "name another split, or null to hold examples out of the training split"
        )
    return part


def _select(part: CheckedSplit, rows: np.ndarray, labels: str | None) -> Dataset:
    """These rows of a split, with the column of labels."""
    split = part.texts
    if labels is not None and part.cells is not None:
        split = add_column(split, labels, part.cells.to_arrow(), part.cells.feature)
    return split.select(rows)


def _load_unlabelled(
    source: Mapping[str, Dataset], data: Data, task: Task, features: Features
) -> Dataset:
    """The texts of `data.unlabelled`, another split or source, with the columns of `features`."""
    name = str(data.unlabelled)
    if name in source:
        where, split = f"split {name} of {data.source}", read_texts(source[name], name, data, task)
    else:
        other = open_source(name, key="data.unlabelled")
        role = data.train if data.train in other else next(iter(other))
        named = replace(data, source=name)
        where, split = f"split {role} of {name}", read_texts(other[role], role, named, task)
    split = split.select(rows_with_text(split, where))
    log.info("%d unlabelled texts of %s are added to the training split", len(split), where)
    for column, feature in features.items():
        if column not in split.column_names:
            empty = pa.nulls(len(split), Features({column: feature}).arrow_schema.field(0).type)
            split = add_column(split, column, empty, feature)
    return split


def _warn_of_missing_labels(
    task: Task, cells: dict[str, LabelColumn | None], rows: dict[str, np.ndarray], data: Data
) -> None:
    """Warn about labels without examples: they are not learned, or not measured."""
    used = {
        role: _names_in(column.used(rows[role]))
        for role in rows
        if (column := cells[role]) is not None
    }
    unused = [name for name in task.names if "train" in used and name not in used["train"]]
    if unused:
        log.warning(
            "no training example of %s is labelled %s: the model cannot learn it",
            data.source,
            shorten(unused),
        )
    for role in sorted(used.keys() - {"train"}, reverse=True):
        known = {*used[role], *unused}
        missing = [name for name in task.names if name not in known]
        if missing:
            log.warning(
                "no example of the %s split has %d of %d labels, %s: it has no metrics of them",
                role,
                len(missing),
                len(task.names),
                shorten(missing),
            )


def _names_in(labels: Iterable[Any]) -> set[str]:
    """The names of labels that are names or lists of them."""
    return {name for label in labels for name in (label if isinstance(label, list) else [label])}


def _warn_of_overlap(splits: DatasetDict, data: Data) -> None:
    """Warn about texts that the training split shares with another: metrics are too optimistic."""
    hashes = {role: _hashes(split, data.text) for role, split in splits.items()}
    for role in ("validation", "test"):
        shared = int(np.isin(hashes[role], hashes["train"]).sum())
        if shared:
            log.warning(
                "%d of %d texts of the %s split are texts of the training split too",
                shared,
                len(splits[role]),
                role,
            )


def _hashes(split: Dataset, columns: list[str]) -> np.ndarray:
    """A hash of each text or pair, 8 bytes, independent of white space."""
    batches = split.select_columns(list(columns)).iter(CHUNK)
    rows = (
        row for batch in batches for row in zip(*(batch[column] for column in columns), strict=True)
    )
    return np.fromiter(
        (hash(tuple(" ".join((text or "").split()) for text in row)) for row in rows),
        dtype=np.int64,
        count=len(split),
    )
