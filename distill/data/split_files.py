"""The files of a folder -> splits: one file for each, or its shards."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from datasets import Dataset

from distill.data.delimited import COMPRESSIONS
from distill.errors import UserError

# train-00000-of-00003, as on the Hub; train-0, train_1 or train.02, as loops write them
OF_SEVERAL = re.compile(
    r"(?P<split>.+?)[-_.](?P<shard>\d+)[-_]of[-_](?P<shards>\d+)(-[0-9a-f]{8,})?"
)
NUMBERED = re.compile(r"(?P<split>.+?)[-_.](?P<shard>\d+)")


class SplitFiles(Mapping[str, Dataset]):
    """The splits of a folder by name, each opened when it is first used.

    A single shard is a split too, by its own name, which is not listed.

    Args:
        files: Those of all splits, and others, which are not opened.
        read: Opens the files of one split.
    """

    def __init__(self, files: Iterable[Path], read: Callable[[list[Path]], Dataset]) -> None:
        self._files, self._read = group(files), read
        self._single = {stem(file): [file] for parts in self._files.values() for file in parts}
        self._opened: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._opened:
            files = self._files[name] if name in self._files else self._single[name]
            if name in self._files:
                _check_complete(name, files)
            self._opened[name] = self._read(files)
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._single

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix of a file's format, and that of its compression or ""."""
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return Path(path.stem).suffix.lower(), compression


def stem(path: Path) -> str:
    """The name of a file without these suffixes."""
    return path.name[: -len("".join(suffixes(path)))]


def group(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the name of their split; shards are in the order of their numbers."""
    files, splits = list(files), dict[str, list[Path]]()
    series = _numbered_series(files)
    for file in files:
        match = OF_SEVERAL.fullmatch(stem(file)) or NUMBERED.fullmatch(stem(file))
        is_shard = match and ("shards" in match.groupdict() or match["split"] in series)
        name = match["split"] if match and is_shard else stem(file)
        splits.setdefault(name, []).append(file)
    return {name: sorted(parts, key=_number) for name, parts in splits.items()}


def _numbered_series(files: list[Path]) -> set[str]:
    """Names whose files are numbered without a gap from 0 or 1."""
    numbers: dict[str, list[int]] = {}
    for file in files:
        if match := NUMBERED.fullmatch(stem(file)):
            numbers.setdefault(match["split"], []).append(int(match["shard"]))
    alone = {stem(file) for file in files}
    return {
        name
        for name, shards in numbers.items()
        if name not in alone and sorted(shards) in _ranges(len(shards))
    }


def _ranges(length: int) -> tuple[list[int], list[int]]:
    return [*range(length)], [*range(1, length + 1)]


def _number(file: Path) -> int:
    match = OF_SEVERAL.fullmatch(stem(file)) or NUMBERED.fullmatch(stem(file))
    return int(match["shard"]) if match else 0


def _check_complete(name: str, files: list[Path]) -> None:
    """UserError if the files are not those of one split."""
    folder, names = files[0].parent, ", ".join(file.name for file in files[:4])
    shards = [OF_SEVERAL.fullmatch(stem(file)) for file in files]
    expected = {int(match["shards"]) if match else 0 for match in shards}
    numbers = [_number(file) for file in files]
    if len({suffixes(file) for file in files}) > 1 or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{folder} holds {names}, but the split {name} needs one file, or shards of one "
            "format: remove the others"
        )
    if expected != {0} and (len(expected) > 1 or expected != {len(files)}):
        raise UserError(
            f"{folder} holds {len(files)} shards of the split {name}, but their names count "
            f"{max(expected)}: add the missing ones, or rename those there are"
        )
