"""DatasetDict -> train, validation and test: columns checked, labels read, held-out examples cut off, labels taken away."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets

from distill.data.sources import open_source
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.base import Task
from distill.tasks.labels import declared, shorten

log = logging.getLogger(__name__)
CHUNK = 1000  # rows that are compared at a time
HOLDOUT_SEED = (
    0  # of the held-out splits: the same for every run, so that runs with other seeds compare
)


class CheckedSplit(NamedTuple):
    """A split as it is checked: rows in the order of the source, and which of them have a text."""

    name: str
    data: Dataset  # the text columns
    cells: list[Any] | None  # labels, by name; null: the task or the recipe has none
    rows: np.ndarray  # those with a text

    def labelled(self) -> np.ndarray:
        """The rows that can train and test a model by their labels."""
        return (
            self.rows
            if self.cells is None
            else np.array([row for row in self.rows if self.cells[row] is not None], dtype=int)
        )


def load(data: Data, task: Task, seed: int) -> DatasetDict:
    """The raw examples: `data.text`, and `data.label` by name, null where an example is unlabelled.

    Reads the label names into `task`. Held-out splits are the same for every seed; `seed` draws the examples that `data.labelled` keeps.
    """
    _refuse_shared(data)
    source = open_source(data.source, data.config)
    labels = data.label if task.uses_labels else None
    if labels is not None:
        _has_columns(_split(source, data.train, "data.train", data), data.train, [labels], data)
    task.read_labels(_split(source, data.train, "data.train", data), data)
    parts = {
        role: _part(source, name, f"data.{role}", data, task) for role, name in _named(data).items()
    }
    chosen, train = _hold_out(parts, data), parts["train"]
    _say_unused(task, train, data)
    if data.labelled is not None:
        train = parts["train"] = train._replace(
            cells=_keep_labels(train, chosen["train"], data.labelled, seed, data)
        )
    splits = DatasetDict(
        {role: _cut(parts.get(role, train), rows, labels) for role, rows in chosen.items()}
    )
    if data.unlabelled is not None:
        splits["train"] = concatenate_datasets(
            [splits["train"], _unlabelled(source, data, splits["train"].features)]
        )
    _say_overlap(splits, data)
    return splits


def _named(data: Data) -> dict[str, str]:
    """The splits that the source holds itself."""
    names = {"train": data.train, "validation": data.validation, "test": data.test}
    return {role: name for role, name in names.items() if name is not None}


def _refuse_shared(data: Data) -> None:
    """A split has one use: what a model has seen in training does not measure it."""
    uses: dict[str, str] = {}
    for key, name in (*_named(data).items(), ("unlabelled", data.unlabelled)):
        if name in uses:
            raise UserError(
                f"data.{key} is {name}, but data.{uses[name]} is that split too: name another, or set data.{key} to null"
            )
        if name is not None:
            uses[name] = key


def _say_overlap(splits: DatasetDict, data: Data) -> None:
    """A text that is trained on and measured on is allowed, but flatters the model."""
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
    """A number for each text or pair: 8 bytes, the same however its words are spaced."""
    batches = split.select_columns(list(columns)).iter(CHUNK)
    rows = (
        row for batch in batches for row in zip(*(batch[column] for column in columns), strict=True)
    )
    return np.fromiter(
        (hash(tuple(" ".join((text or "").split()) for text in row)) for row in rows),
        dtype=np.int64,
        count=len(split),
    )


def _split(source: DatasetDict, name: str, key: str, data: Data) -> Dataset:
    if name not in source:
        out = (
            "name one of them"
            if key == "data.train"
            else "name one of them, or null to hold examples out of the training split"
        )
        raise UserError(
            f"{key} is {name}, but {data.source} has the splits {shorten(source)}: {out}"
        )
    return source[name]


def _part(source: DatasetDict, name: str, key: str, data: Data, task: Task) -> CheckedSplit:
    split = _split(source, name, key, data)
    texts = _texts(split, name, data)
    cells = _cells(split, name, data, task) if task.uses_labels and data.label is not None else None
    part = CheckedSplit(name, texts, cells, _with_text(texts, f"split {name} of {data.source}"))
    if key != "data.train" and len(part.labelled()) == 0:
        raise UserError(
            f"{key} is {name}, but none of its examples has a label: name another split, or null to hold examples out of the training split"
        )
    return part


def _texts(split: Dataset, name: str, data: Data) -> Dataset:
    """The text columns alone, as strings."""
    _has_columns(split, name, data.text, data)
    for column in data.text:
        dtype = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        if dtype not in ("string", "large_string", "null"):
            raise UserError(
                f"column {column!r} of split {name} of {data.source} holds {dtype}, but a text is a string: choose another in data.text"
            )
    wanted = Features({column: Value("string") for column in data.text})
    texts = split.select_columns(list(data.text))
    return texts if texts.features == wanted else texts.cast(wanted)


def _has_columns(split: Dataset, name: str, columns: Iterable[str], data: Data) -> None:
    for column in columns:
        if column not in split.column_names:
            key = "data.label" if column == data.label and column not in data.text else "data.text"
            raise UserError(
                f"{key} is {column}, but split {name} of {data.source} has the columns {shorten(split.column_names)}: name one of them"
            )


def _with_text(texts: Dataset, where: str) -> np.ndarray:
    """Rows that hold more than white space, at least one."""
    none = np.empty((len(texts.column_names), 0), dtype=bool)
    tables = texts.with_format("arrow").iter(CHUNK)
    blank = np.concatenate(
        [none, *(np.stack([_blank(column) for column in table.columns]) for table in tables)],
        axis=1,
    )
    empty = np.logical_and.reduce(blank)
    if empty.all():
        raise UserError(
            f"{where} has {len(texts)} rows, but none of them has a text: name another split or column"
        )
    half = np.logical_or.reduce(blank) & ~empty
    if half.any():
        log.info(
            "%d of %d pairs in %s have one empty side: kept, the first in row %d",
            half.sum(),
            len(texts),
            where,
            half.argmax(),
        )
    if empty.any():
        log.info(
            "%d of %d examples in %s are empty: dropped, the first in row %d",
            empty.sum(),
            len(texts),
            where,
            empty.argmax(),
        )
    return np.flatnonzero(~empty)


def _blank(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()


def _cells(split: Dataset, name: str, data: Data, task: Task) -> list[Any]:
    """The label column by name; a cell that cannot be a label is answered by its row, counted from 0."""
    column = str(data.label)
    _has_columns(split, name, [column], data)
    names, cells = declared(split.features[column]), []
    for row, cell in enumerate(
        cell for batch in split.select_columns([column]).iter(CHUNK) for cell in batch[column]
    ):
        try:
            label = task.label(cell, names)
            cells.append(
                sys.intern(label) if isinstance(label, str) else label
            )  # one name for all examples that have it
        except ValueError as error:
            raise UserError(
                f"column {column!r} of split {name} of {data.source} is {cell!r} in row {row}, but {error}"
            ) from error
    return cells


def _say_unused(task: Task, train: CheckedSplit, data: Data) -> None:
    """A class without examples is allowed, but seldom meant."""
    used = {
        name for cell in train.cells or [] for name in (cell if isinstance(cell, list) else [cell])
    }
    unused = [name for name in task.names if name not in used]
    if train.cells is not None and unused:
        log.warning(
            "no training example of %s is labelled %s: the model cannot learn it",
            data.source,
            shorten(unused),
        )


def _hold_out(parts: dict[str, CheckedSplit], data: Data) -> dict[str, np.ndarray]:
    """The rows of each split. A split that the source does not hold is drawn from the labelled training examples."""
    chosen = {role: part.rows for role, part in parts.items()}
    missing = [role for role in ("validation", "test") if role not in parts]
    if not missing:
        return chosen
    candidates = parts["train"].labelled()
    order = np.random.default_rng(HOLDOUT_SEED).permutation(candidates)
    size = max(1, round(data.holdout * len(order)))
    if len(order) <= 2 * size:
        raise UserError(
            f"data.{missing[0]} is null, but {len(order)} labelled training examples are too few to hold some out: name a split"
        )
    drawn = {
        "validation": order[:size],
        "test": order[-size:],
    }  # either stays the same whether or not the other is held out
    chosen |= {role: np.sort(drawn[role]) for role in missing}
    held = np.concatenate([drawn[role] for role in missing])
    return chosen | {"train": np.setdiff1d(chosen["train"], held)}


def _keep_labels(
    train: CheckedSplit, rows: np.ndarray, keep: int, seed: int, data: Data
) -> list[Any]:
    """The labels, all but `keep` of those in `rows` taken away. What stays is drawn class by class."""
    if train.cells is None:
        raise UserError(
            f"data.labelled is {keep}, but the examples of {data.source} are used without labels: leave data.labelled out"
        )
    labelled = [int(row) for row in rows if train.cells[row] is not None]
    if keep > len(labelled):
        raise UserError(
            f"data.labelled is {keep}, but only {len(labelled)} training examples have a label: keep at most these"
        )
    strata = [
        cell if isinstance(cell, str) else "" for cell in (train.cells[row] for row in labelled)
    ]  # lists and numbers are drawn as one class
    counts = Counter(strata)
    if keep < len(counts):
        raise UserError(
            f"data.labelled is {keep}, but each of the {len(counts)} classes needs a labelled example: keep at least {len(counts)}"
        )
    generator, kept = np.random.default_rng(seed), set()
    for name, quota in largest_remainder(counts, keep).items():
        members = [row for row, stratum in zip(labelled, strata, strict=True) if stratum == name]
        kept |= set(generator.choice(members, quota, replace=False).tolist())
    taken = set(labelled) - kept
    return [None if row in taken else cell for row, cell in enumerate(train.cells)]


def largest_remainder(counts: dict[str, int], total: int) -> dict[str, int]:
    """Share out `total` in proportion to `counts`, at least 1 and at most its count to each, by largest remainder."""
    share = {name: total * count / sum(counts.values()) for name, count in sorted(counts.items())}
    quota = {name: max(1, int(part)) for name, part in share.items()}
    while sum(quota.values()) < total:
        quota[
            max(
                (name for name in share if quota[name] < counts[name]),
                key=lambda name: share[name] - quota[name],
            )
        ] += 1
    while sum(quota.values()) > total:
        quota[
            min(
                (name for name in share if quota[name] > 1),
                key=lambda name: share[name] - quota[name],
            )
        ] -= 1
    return quota


def _cut(part: CheckedSplit, rows: np.ndarray, labels: str | None) -> Dataset:
    """The chosen rows, with their labels beside them."""
    split = part.data
    if labels is not None and part.cells is not None:
        split = split.add_column(labels, part.cells, feature=_feature(part.cells))
    return split.select(rows)


def _feature(cells: list[Any]) -> Any:
    """The type of labels: a name, a list of names or a number."""
    first = next((cell for cell in cells if cell is not None), "")
    if isinstance(first, list):
        return List(Value("string"))
    return Value("float64") if isinstance(first, float) else Value("string")


def _unlabelled(source: DatasetDict, data: Data, features: Features) -> Dataset:
    """The texts of a further split or source, in the shape of the training examples."""
    name = str(data.unlabelled)
    if name in source:
        where, texts = f"split {name} of {data.source}", _texts(source[name], name, data)
    else:
        other = open_source(name)
        split = data.train if data.train in other else next(iter(other))
        where, texts = f"split {split} of {name}", _texts(other[split], split, data)
    texts = texts.select(_with_text(texts, where))
    log.info("%d texts of %s take part in training without labels", len(texts), where)
    for column, feature in features.items():
        if column not in texts.column_names:
            texts = texts.add_column(column, [None] * len(texts), feature=feature)
    return texts
