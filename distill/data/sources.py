"""`data.source` -> splits: a function, a local file or folder, or a dataset of the Hub."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from distill import store
from distill.data import delimited
from distill.data.split_files import SplitFiles, suffixes
from distill.errors import UserError
from distill.recipe import targets

# Only an empty cell is missing: "NA" and "None" are texts.
CSV = {"keep_default_na": False, "na_values": [""], "chunksize": 1_000_000}
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # unless the header has another
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", CSV),
    ".tab": ("csv", CSV),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),  # one example per line, in the column `text`
}
FOREIGN = (".arrow", ".zip", ".tar")  # what `load_dataset` reads besides, in a folder of its own
STORED_BYTES = 2**25  # size of a file from which its delimiter and quotes are stored
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# The Hub is unreachable, or the dataset or its configuration is unknown, or needs a script.
HUB_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)


def open_source(
    source: str, config: str | None = None, key: str = "data.source"
) -> Mapping[str, Dataset]:
    """The splits of a source by name.

    Args:
        source: A dataset of the Hub, a local file or folder (CSV, TSV, JSON, Parquet, text; also
            compressed by gzip, bzip2 or xz), or the dotted path of a function that returns a
            `DatasetDict`.
        config: A configuration of a dataset of the Hub, or of a folder laid out like one.
        key: The recipe's key of the source, for error messages.

    Raises:
        UserError: The source cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, config, key)
    if config is not None and (path.is_file() or FUNCTION.fullmatch(source)):
        _refuse_config(config, source)
    if path.is_file():
        return DatasetDict(train=_open_files([path], key))
    if _is_data(path) or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(f"{key} is {source}, but there is no such file or folder: correct the path")
    if FUNCTION.fullmatch(source):
        return call_function(source, key)
    return _open_hub(source, config, key)


def _refuse_config(config: str, source: str | Path) -> None:
    raise UserError(
        f"data.config is {config}, but {source} has no configurations: leave data.config out"
    )


def call_function(source: str, key: str = "data.source") -> DatasetDict:
    """The splits that a function returns."""
    function = targets.import_function(key, source)
    try:
        splits = function()
    except UserError:
        raise
    except Exception as error:
        raise targets.user_error(key, source, error) from error
    if not isinstance(splits, dict) or not all(
        isinstance(split, Dataset) for split in splits.values()
    ):
        raise UserError(
            f"{key} is {source}, but it returned {_describe(splits)}: "
            "let it return a datasets.DatasetDict"
        )
    return DatasetDict(splits)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "a dict of other things than datasets"
    return f"an object of the type {type(value).__name__}"


def _is_data(path: Path) -> bool:
    return suffixes(path)[0] in BUILDERS


def _open_files(paths: list[Path], key: str = "data.source") -> Dataset:
    """The rows of a file, or of several of one format."""
    for path in paths:
        if not _is_data(path):
            raise UserError(
                f"{key} is {path}, but the suffix of a file must be one of "
                f"{', '.join(BUILDERS)}, perhaps with .gz: convert or rename it"
            )
        if path.stat().st_size == 0:
            raise UserError(
                f"{path} is empty, but it must hold examples: fill it, or name another file"
            )
    suffix, _ = suffixes(paths[0])
    builder, fixed = BUILDERS[suffix]
    options = fixed | _delimited_options(paths, suffix)
    return _load_dataset(paths, builder, data_files=[*map(str, paths)], split="train", **options)


def _delimited_options(paths: list[Path], suffix: str) -> dict[str, Any]:
    """The delimiter, quotes and decimal point of these files; {} for other formats."""
    if suffix not in DELIMITERS:
        return {}
    read = [
        _translate_errors(path, partial(_stored_options, path, DELIMITERS[suffix]))
        for path in paths
    ]
    for path, options in zip(paths, read, strict=True):
        for name in ("sep", "quoting", "escapechar"):
            if options[name] != read[0][name]:
                raise UserError(
                    f"{path} needs {name}={options[name]!r} of pandas.read_csv, but {paths[0]} "
                    f"needs {read[0][name]!r}: write the delimiters and quotes of all shards alike"
                )
    decimal_comma = any(options["decimal"] == "," for options in read)
    return read[0] | {"decimal": "," if decimal_comma else "."}


def _stored_options(path: Path, delimiter: str) -> dict[str, Any]:
    """The options of one file; those of a large one are stored, because it is read for them."""
    if path.stat().st_size < STORED_BYTES:
        return delimited.options(path, delimiter)
    key = {"version": 2, "file": store.sha256(path), "delimiter": delimiter}
    entry = store.entry_path("delimiters", key)
    if not store.is_intact(entry):
        options = delimited.options(path, delimiter)
        with store.write_entry(entry) as folder:
            (folder / "options.json").write_text(json.dumps(options))
    options = json.loads((entry / "options.json").read_text())
    return dict(options)


def _open_folder(path: Path, config: str | None, key: str) -> Mapping[str, Dataset]:
    """Open a folder written by `save_to_disk`, with files for each split, or as on the Hub."""
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    files = sorted(
        file for file in path.iterdir() if _is_data(file) and not file.name.startswith(".")
    )
    tables = [file for file in files if suffixes(file)[0] != ".txt"]
    if not saved and (config is not None or not files or (not tables and _has_data_below(path))):
        _check_has_data(path, key)
        return _as_dict(_load_dataset([path], str(path), config))
    if config is not None:
        _refuse_config(config, path)
    if saved:
        splits = _as_dict(_translate_errors(path, lambda: datasets.load_from_disk(str(path))))
        for split in splits.values():
            check_encoding(split.data.table, str(path))
        return splits
    return SplitFiles(files, _open_files)


def _check_has_data(path: Path, key: str) -> None:
    """UserError if a folder holds a dataset script, or no file that could hold texts."""
    script = path / f"{path.resolve().name}.py"
    if script.is_file():
        raise UserError(
            f"{key} is {path}, but its {script.name} is a dataset script, which is never run here: "
            "save its splits with save_to_disk, or as Parquet or JSON lines"
        )
    files = [file for file in path.rglob("*") if file.is_file()]
    if not any(_is_data(file) or file.suffix in FOREIGN for file in files):
        kinds = sorted({file.suffix.lower() for file in files} - {""})
        held = f"files of the kinds {', '.join(kinds)}" if kinds else "none of a known kind"
        raise UserError(
            f"{key} is {path}, but its files must be of the kinds {', '.join(BUILDERS)}, and it "
            f"holds {held}: name a folder or file with texts"
        )


def _has_data_below(path: Path) -> bool:
    """Whether a subfolder holds data, as `data/` does in a folder laid out as on the Hub."""
    return any(
        _is_data(file) for each in path.iterdir() if each.is_dir() for file in each.rglob("*")
    )


def _load_dataset(paths: list[Path], *arguments: Any, **options: Any) -> Any:
    """`load_dataset` for local files, cached by content, not by name and modification time."""
    path = paths[0] if len(paths) == 1 else paths[0].parent
    loaded = _translate_errors(
        path,
        lambda: datasets.load_dataset(
            *arguments, cache_dir=str(store.cache_root() / "sources" / _digest(paths)), **options
        ),
    )
    for split in _as_dict(loaded).values():
        check_encoding(split.data.table, str(path))
    return loaded


def check_encoding(rows: pa.Table, source: str) -> None:
    """UserError if a text is not in UTF-8, which the readers of JSON and Parquet do not check."""
    for name in rows.column_names:
        try:
            rows.column(name).validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"column {name!r} of {source} holds bytes that are no text in UTF-8, but texts "
                "must be: convert the file, or leave the row out"
            ) from error


def _digest(paths: list[Path]) -> str:
    """SHA-256 of files, or of the names and contents of a folder's files, hidden ones excepted."""
    path = paths[0]
    if path.is_file():
        digests = [store.sha256(each) for each in paths]
        return digests[0] if len(paths) == 1 else hashlib.sha256(repr(digests).encode()).hexdigest()
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
    except UserError:
        raise
    except Exception as error:  # what readers of others raise is not limited
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if _is_cache_error(cause, path):
            raise UserError(
                f"{store.cache_root()} cannot be written ({first_line(cause)}), but a copy of "
                f"{path} is stored there: set DISTILL_CACHE to a folder with room"
            ) from error
        raise UserError(
            f"{path} cannot be read ({first_line(cause)}), but it must hold examples, one per "
            "row: correct or convert it"
        ) from error


def _is_cache_error(error: BaseException, path: Path) -> bool:
    """Whether an error of the operating system is about the cache, not about the source."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.filename is None or not Path(str(error.filename)).resolve().is_relative_to(
        path.resolve()
    )


def _open_hub(source: str, config: str | None, key: str) -> DatasetDict:
    name = f"{source} ({config})" if config else source
    try:
        return _as_dict(datasets.load_dataset(source, config))
    except HUB_ERRORS as error:
        raise UserError(
            f"{key} is {name}, but there is no such file here, and it could not be read from the "
            f"Hugging Face Hub ({first_line(error)}): check the name and the network, or name a "
            f"local file or folder, one of {', '.join(BUILDERS)}, in its place"
        ) from error


def _as_dict(loaded: Any) -> DatasetDict:
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    line = str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
    return "it has no rows" if "corresponds to no data" in line else line
