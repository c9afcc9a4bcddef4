"""The files of a model folder that hold weights, checked without reading the weights."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from distill.errors import UserError
from distill.models.hub import OBJECTS, describe, json_problem, resolve_path, translate_errors
from distill.remote_code import container

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each also in shards with an index
POINTER = b"version https://git-lfs"  # what Git LFS leaves in place of a file


def check_json(folder: Path, name: str, key: str) -> None:
    """Check the JSON files of a model folder that transformers reads.

    Args:
        folder: A folder in the format of transformers.
        name: Its name in the recipe.
        key: The recipe's key of that name.

    Raises:
        UserError: One is damaged.
    """
    for file in (folder / each for each in OBJECTS if each != "tokenizer.json"):  # it is large
        problem = json_problem(file) if file.exists() else None
        if problem:
            raise UserError(
                f"{key} is {name}, but its {file.name} {problem}: save or download the model again"
            )


def check_weights(name: str, key: str) -> None:
    """Check that the weights of a model can be read; those on the Hub are checked when loaded.

    Raises:
        UserError: There are none, or one of their files is damaged or only a pointer to it.
    """
    folder = Path(resolve_path(name, key))
    if not folder.is_dir():
        return
    for file in _files_that_are_read(folder, name, key):
        if file.suffix == ".safetensors":
            _check_tensors(file, name, key)
        else:
            with translate_errors(name, key):
                torch.load(file, map_location="meta", weights_only=True)


def _files_that_are_read(folder: Path, name: str, key: str) -> list[Path]:
    """The files of weights that transformers chooses, or our own code; UserError if none exist.

    A download of the safetensors alone has the index of the pickles too, without their files.
    """
    for file in (folder / each for each in (*WEIGHTS, container.FILE)):
        index = file.with_name(f"{file.name}.index.json")
        if file.exists():
            return [file]
        if index.is_file():
            return _shards(index, name, key)
    raise UserError(
        f"{key} is {name}, but this folder has no {WEIGHTS[0]}: "
        "name a folder that save_pretrained wrote"
    )


def _shards(index: Path, name: str, key: str) -> list[Path]:
    """The files that an index names; UserError if one is missing."""
    named = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(
            f"{key} is {name}, but its {index.name} has no weight_map: download the model again"
        )
    shards = sorted({str(each) for each in named.values()})
    missing = next((each for each in shards if not (index.parent / each).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{key} is {name}, but {missing}, which its {index.name} names, is not there: "
            "download the model again"
        )
    return [index.parent / each for each in shards]


def _check_tensors(file: Path, name: str, key: str) -> None:
    """UserError unless the header of a safetensors file describes exactly its content."""
    start = f"{key} is {name}, but its {file.name}"
    try:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise UserError(f"{start} is a pointer of Git LFS, not weights: run git lfs pull")
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{start} is damaged ({describe(error)}): save or download the model again"
        ) from error
