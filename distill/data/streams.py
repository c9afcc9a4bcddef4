"""`data.streaming`: shards -> rows in an order of seed and epoch, without a first pass.

A lane is what one process, or one of its workers, reads. Where there are enough shards, each lane
reads other shards, else every lane reads its share of the rows of each. Rows are shuffled in blocks
of consecutive ones, so that a place in the stream is a place in its shards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset

from distill.data.sources import FUNCTION, HUB_ERRORS, call_function, check_encoding, first_line
from distill.data.split_files import group, suffixes
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks.labels import shorten

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_PARTS = 4  # shards of a split that a function returns


class Place(NamedTuple):
    """Where a lane's next block of rows begins."""

    epoch: int = 0
    shard: int = 0  # shards of the lane in this epoch before it
    row: int = 0  # rows of that shard before it


@dataclass(frozen=True)
class Stream:
    """The training split of a recipe.

    Args:
        shards: Its rows.
        held_out: Rows at the beginning of each shard that are in other splits.
        data: The recipe's section `data`.
        seed: Shuffles shards and rows.
    """

    shards: IterableDataset
    held_out: tuple[int, ...]
    data: Data
    seed: int

    def order(self, epoch: int) -> list[int]:
        """The shards in the order of an epoch, whatever the number of lanes."""
        generator = np.random.default_rng([self.seed, epoch])
        return generator.permutation(len(self.held_out)).tolist()

    def blocks(self, lane: int, lanes: int, place: Place) -> Iterator[tuple[Place, pa.Table]]:
        """Shuffled blocks of a lane's rows from a place on, with their places, without end."""
        while True:
            rows, complete = 0, place == Place(place.epoch)
            for each, table in self._epoch(lane, lanes, place):
                rows += len(table)
                yield each, table
            if complete and not rows:
                raise UserError(
                    f"data.source is {self.data.source}, but its shards have no row for reader "
                    f"{lane} of {lanes}: use fewer processes and data.workers, or set "
                    "data.streaming=false"
                )
            place = Place(place.epoch + 1)

    def _epoch(self, lane: int, lanes: int, place: Place) -> Iterator[tuple[Place, pa.Table]]:
        """The blocks of an epoch from a place on."""
        order, epoch = self.order(place.epoch), place.epoch
        shared = len(order) < lanes
        order = order if shared else order[lane::lanes]
        for index in range(place.shard, len(order)):
            shard = order[index]
            first = max(place.row if index == place.shard else 0, self.held_out[shard])
            for table in self._tables(shard, first, lanes if shared else 1):
                rows = np.random.default_rng([self.seed, epoch, shard, first])
                shuffled = rows.permutation(len(table))
                yield (
                    Place(epoch, index, first),
                    table.take(shuffled[lane::lanes] if shared else shuffled),
                )
                first += len(table)

    def _tables(self, shard: int, first: int, lanes: int) -> Iterator[pa.Table]:
        """The rows of a shard from one on, as many at a time as these lanes shuffle."""
        rows = self.shards.shard(len(self.held_out), shard)
        rows = rows.skip(first) if first else rows
        tables = rows.with_format("arrow").iter(lanes * self.data.stream_buffer)
        while True:
            with _translated(self.data.source):
                table = next(tables, None)
            if table is None:
                break
            check_encoding(table, self.data.source)
            yield table


def open_stream(data: Data, seed: int) -> tuple[Stream, DatasetDict]:
    """The training split as a stream, and splits of its source that are read at once.

    Returns:
        The stream, and train, validation and test by these names: the first rows of the training
        split are those of a split without a name, and the next ones stand for it where examples are
        needed.

    Raises:
        UserError: The source cannot be read as a stream.
    """
    source = _open(data)
    names = {"train": data.train, "validation": data.validation, "test": data.test}
    shards = source.get(data.train)
    for role, name in names.items():
        if name is not None and name not in source:
            raise UserError(
                f"data.{role} is {name}, but {data.source} has the splits {shorten(source)}: "
                "name one of them, or with data.streaming null for the first rows of data.train"
            )
    assert shards is not None
    held_out = [role for role in ("validation", "test") if names[role] is None]
    count, roles = data.stream_holdout, [*held_out, "train"]
    numbers, rows = _first_rows(shards, count * len(roles), data.source)
    if len(rows) <= count * len(held_out):
        raise UserError(
            f"data.stream_holdout is {count}, but split {data.train} of {data.source} has only "
            f"{len(rows)} rows, of which {len(held_out)} splits take as many: lower it"
        )
    splits = {
        role: Dataset.from_list(rows[place * count : (place + 1) * count], features=shards.features)
        for place, role in enumerate(roles)
    }
    for role in {"validation", "test"} - {*held_out}:
        splits[role] = Dataset.from_list(list(source[str(names[role])]))
    taken = np.bincount(numbers[: count * len(held_out)], minlength=shards.num_shards)
    return Stream(shards, tuple(taken.tolist()), data, seed), DatasetDict(splits)


def _first_rows(
    shards: IterableDataset, count: int, source: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """The first rows, and the number of the shard that each is in."""
    total = shards.num_shards
    rows = ((index, row) for index in range(total) for row in shards.shard(total, index))
    with _translated(source):
        first = list(islice(rows, count))
    return [index for index, _ in first], [row for _, row in first]


@contextmanager
def _translated(source: str) -> Iterator[None]:
    """UserError if a shard cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what readers of others raise is not limited
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise UserError(
            f"{source} cannot be read further ({first_line(error)}), but each shard must hold "
            "examples, one per row: correct or remove the damaged one"
        ) from error


def _open(data: Data) -> Mapping[str, IterableDataset]:
    """The splits of a source, of which no row is read yet."""
    path = Path(data.source).expanduser()
    if path.exists():
        files = (
            [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
        )
        names = group(file for file in files if suffixes(file)[0] in FORMATS)
        if not names:
            raise UserError(
                f"data.streaming is true and data.source is {path}, but a stream needs files of "
                f"the formats {', '.join(FORMATS)}: convert them, or set data.streaming=false"
            )
        if path.is_file():
            names = {"train": [path]}
        return {name: _open_files(shards) for name, shards in names.items()}
    if FUNCTION.fullmatch(data.source):
        splits = call_function(data.source, "data.source")
        return {name: split.to_iterable_dataset(_PARTS) for name, split in splits.items()}
    try:
        return datasets.load_dataset(data.source, data.config, streaming=True)
    except HUB_ERRORS as error:
        raise UserError(
            f"data.source is {data.source}, but it could not be read from the Hugging Face Hub "
            f"({str(error).strip().splitlines()[0]}): check the name and the network"
        ) from error


def _open_files(files: list[Path]) -> IterableDataset:
    builder = FORMATS[suffixes(files[0])[0]]
    with _translated(str(files[0].parent)):
        return datasets.load_dataset(
            builder, data_files=[str(file) for file in files], split="train", streaming=True
        )
