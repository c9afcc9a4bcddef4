"""`data.source` -> splits: a function, a local file or folder, or a dataset of the Hub."""

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

# Only an empty cell is missing: "NA" and "None" are texts.
CSV = {"keep_default_na": False, "na_values": [""], "chunksize": 1_000_000}
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),  # one example per line, in the column `text`
}
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# The Hub is unreachable, or the dataset or its configuration is unknown, or needs a script.
HUB_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)


def open_source(source: str, config: str | None = None) -> DatasetDict:
    """Open all splits of a source.

    Args:
        source: A dataset of the Hub, a local file or folder (CSV, JSON, Parquet, text), or the
            dotted path of a function that returns a `DatasetDict`.
        config: A configuration of a dataset of the Hub, or of a folder laid out like one.

    Raises:
        UserError: The source cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, config)
    if config is not None and (path.is_file() or FUNCTION.fullmatch(source)):
        _refuse_config(config, source)
    if path.is_file():
        return DatasetDict(train=_open_file(path))
    if path.suffix in BUILDERS or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(
            f"data.source is {source}, but there is no such file or folder: correct the path"
        )
    if FUNCTION.fullmatch(source):
        return _call(source)
    return _open_hub(source, config)


def _refuse_config(config: str, source: str | Path) -> None:
    raise UserError(
        f"data.config is {config}, but {source} has no configurations: leave data.config out"
    )


def _call(source: str) -> DatasetDict:
    """The splits that a function returns."""
    splits = _import_function(source)()
    if not isinstance(splits, dict) or not all(
        isinstance(split, Dataset) for split in splits.values()
    ):
        raise UserError(
            f"data.source is {source}, but it returned {_describe(splits)}: "
            "let it return a datasets.DatasetDict"
        )
    return DatasetDict(splits)


def _import_function(source: str) -> Callable[[], Any]:
    module, _, name = source.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"data.source is {source}, but {module} cannot be imported ({error}): "
            "correct the dotted path"
        ) from error
    except AttributeError as error:
        raise UserError(
            f"data.source is {source}, but the module {module} has no {name}: "
            "correct the dotted path"
        ) from error
    if not callable(function):
        raise UserError(
            f"data.source is {source}, but that is {_describe(function)}: "
            "name a function that returns a datasets.DatasetDict"
        )
    return function


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "a dict of other things than datasets"
    return f"an object of the type {type(value).__name__}"


def _open_file(path: Path) -> Dataset:
    if path.suffix not in BUILDERS:
        raise UserError(
            f"data.source is {path}, but the suffix of a file must be one of "
            f"{', '.join(BUILDERS)}: convert or rename it"
        )
    if path.stat().st_size == 0:
        raise UserError(
            f"{path} is empty, but it must hold examples: fill it, or name another file"
        )
    builder, options = BUILDERS[path.suffix]
    return _load_dataset(path, builder, data_files=str(path), split="train", **options)


def _open_folder(path: Path, config: str | None) -> DatasetDict:
    """Open a folder written by `save_to_disk`, with a file per split, or laid out as on the Hub."""
    files = sorted(
        file for file in path.iterdir() if file.suffix in BUILDERS and not file.name.startswith(".")
    )
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved and (config is not None or not files):
        return _as_dict(_load_dataset(path, str(path), config))
    if config is not None:
        _refuse_config(config, path)
    if saved:
        return _as_dict(_translate_errors(path, lambda: datasets.load_from_disk(str(path))))
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"{path} holds {', '.join(file.name for file in files)}, but each split needs one "
            "file: remove the others"
        )
    return DatasetDict({file.stem: _open_file(file) for file in files})


def _load_dataset(path: Path, *arguments: Any, **options: Any) -> Any:
    """`load_dataset` for local files, cached by content, not by name and modification time."""
    return _translate_errors(
        path,
        lambda: datasets.load_dataset(
            *arguments, cache_dir=str(store.cache_root() / "sources" / _digest(path)), **options
        ),
    )


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files, hidden ones excepted."""
    if path.is_file():
        return store.sha256(path)
    names = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    files = [
        (str(name), store.sha256(path / name))
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _translate_errors(path: Path, read: Callable[[], Any]) -> Any:
    """Call `read`; UserError if the files cannot be read, or the cache cannot be written."""
    try:
        return read()
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if _is_cache_error(cause, path):
            raise UserError(
                f"{store.cache_root()} cannot be written ({_first_line(cause)}), but a copy of "
                f"{path} is stored there: set DISTILL_CACHE to a folder with room"
            ) from error
        raise UserError(
            f"{path} cannot be read ({_first_line(cause)}), but it must hold examples, one per "
            "row: correct or convert it"
        ) from error


def _is_cache_error(error: BaseException, path: Path) -> bool:
    """Whether an error of the operating system is about the cache, not about the source."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.filename is None or not Path(str(error.filename)).resolve().is_relative_to(
        path.resolve()
    )


def _open_hub(source: str, config: str | None) -> DatasetDict:
    name = f"{source} ({config})" if config else source
    try:
        return _as_dict(datasets.load_dataset(source, config))
    except HUB_ERRORS as error:
        raise UserError(
            f"data.source is {name}, but it could not be read from the Hugging Face Hub "
            f"({_first_line(error)}): check the name and the network, or name a local file or "
            f"folder, one of {', '.join(BUILDERS)}, in its place"
        ) from error


def _as_dict(loaded: Any) -> DatasetDict:
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
