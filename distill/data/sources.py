"""`data.source` -> DatasetDict: a function, a local file or folder, or a dataset of the Hugging Face Hub."""

import hashlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from distill import store
from distill.errors import UserError

CSV = {
    "keep_default_na": False,
    "na_values": [""],
    "chunksize": 1_000_000,
}  # only an empty cell is empty: "NA" and "None" are texts
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),  # an example a line, in the column `text`
}
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
HUB_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    DatasetsError,
)  # unreachable, or unknown; no such configuration; a dataset that is a script


def open_source(source: str, config: str | None = None) -> DatasetDict:
    """Every split of a source."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if config is not None and (path.is_file() or FUNCTION.fullmatch(source)):
        raise UserError(
            f"data.config is {config}, but {source} has no configurations: leave data.config out"
        )
    if path.is_file():
        return DatasetDict(train=_file(path))
    if path.suffix in BUILDERS or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(
            f"data.source is {source}, but there is no such file or folder: correct the path"
        )
    if FUNCTION.fullmatch(source):
        return _call(source)
    return _hub(source, config)


def _call(source: str) -> DatasetDict:
    """The splits that a function makes."""
    splits = _function(source)()
    if not isinstance(splits, dict) or not all(
        isinstance(split, Dataset) for split in splits.values()
    ):
        raise UserError(
            f"data.source is {source}, but it returned {_kind(splits)}: let it return a datasets.DatasetDict"
        )
    return DatasetDict(splits)


def _function(source: str) -> Callable[[], Any]:
    module, _, name = source.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"data.source is {source}, but {module} cannot be imported ({error}): correct the dotted path"
        ) from error
    except AttributeError as error:
        raise UserError(
            f"data.source is {source}, but the module {module} has no {name}: correct the dotted path"
        ) from error
    if not callable(function):
        raise UserError(
            f"data.source is {source}, but that is {_kind(function)}: name a function that returns a datasets.DatasetDict"
        )
    return function


def _kind(value: Any) -> str:
    return (
        "a dict of other things than datasets"
        if isinstance(value, dict)
        else f"an object of the type {type(value).__name__}"
    )


def _file(path: Path) -> Dataset:
    if path.suffix not in BUILDERS:
        raise UserError(
            f"data.source is {path}, but files are read by their suffix, one of {', '.join(BUILDERS)}: convert or rename it"
        )
    if path.stat().st_size == 0:
        raise UserError(
            f"{path} is empty, but it must hold examples: fill it, or name another file"
        )
    builder, options = BUILDERS[path.suffix]
    return _loaded(path, builder, data_files=str(path), split="train", **options)


def _folder(path: Path, config: str | None) -> DatasetDict:
    """Saved by `save_to_disk`, one file per split, or laid out as on the Hub."""
    files = sorted(
        file for file in path.iterdir() if file.suffix in BUILDERS and not file.name.startswith(".")
    )
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved and (config is not None or not files):
        return _as_dict(_loaded(path, str(path), config))
    if config is not None:
        raise UserError(
            f"data.config is {config}, but {path} has no configurations: leave data.config out"
        )
    if saved:
        return _as_dict(_quietly(path, lambda: datasets.load_from_disk(str(path))))
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"{path} holds {', '.join(file.name for file in files)}, but each split needs one file: remove the others"
        )
    return DatasetDict({file.stem: _file(file) for file in files})


def _loaded(path: Path, *arguments: Any, **options: Any) -> Any:
    """What `load_dataset` makes of local files, in a cache that goes by their content: its own goes by their names and times."""
    return _quietly(
        path,
        lambda: datasets.load_dataset(
            *arguments, cache_dir=str(store.cache_root() / "sources" / _content(path)), **options
        ),
    )


def _content(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder and their names; hidden ones are no data."""
    if path.is_file():
        return store.sha256(path)
    names = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    files = [
        (str(name), store.sha256(path / name))
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _quietly(path: Path, read: Callable[[], Any]) -> Any:
    """Read local files; what is wrong with them, or with the cache, is one sentence."""
    try:
        return read()
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if _elsewhere(cause, path):
            raise UserError(
                f"{store.cache_root()} cannot be written ({_reason(cause)}), but what is read from {path} is kept there: "
                "set DISTILL_CACHE to a folder with room"
            ) from error
        raise UserError(
            f"{path} cannot be read ({_reason(cause)}), but it must hold examples, one per row: correct or convert it"
        ) from error


def _elsewhere(error: BaseException, path: Path) -> bool:
    """Whether the system refused something else than the source: the cache, which is all that is written."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.filename is None or not Path(str(error.filename)).resolve().is_relative_to(
        path.resolve()
    )


def _hub(source: str, config: str | None) -> DatasetDict:
    name = f"{source} ({config})" if config else source
    way_out = f"check the name and the network, or name a local file or folder, one of {', '.join(BUILDERS)}, in its place"
    try:
        return _as_dict(datasets.load_dataset(source, config))
    except HUB_ERRORS as error:
        raise UserError(
            f"data.source is {name}, but it could not be read from the Hugging Face Hub ({_reason(error)}): {way_out}"
        ) from error


def _as_dict(loaded: Any) -> DatasetDict:
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _reason(error: BaseException) -> str:
    """The first line of what a library says."""
    return str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
