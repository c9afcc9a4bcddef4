"""Models in one GGUF file, as llama.cpp uses them, which become ordinary folders.

The weights are dequantized into bfloat16, whose 8 significant bits are more than the quantized
formats have. A file is converted once; the folder is kept in the store.
"""

import logging
import os
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import store
from distill.errors import UserError

__all__ = ["SUFFIX", "convert"]

log = logging.getLogger("distill")
SUFFIX = ".gguf"
VERSION = 1  # of the folder: increment it to convert again
PACKAGES = ("gguf", "accelerate")  # what transformers needs to read the format


def convert(file: Path, key: str) -> Path:
    """The folder with the model and tokenizer of a GGUF file; errors as transformers raises them.

    Args:
        file: The file.
        key: The recipe's key of its name, for error messages.

    Raises:
        UserError: A package that reads the format is not installed.
    """
    status = file.stat()
    return _convert_once(file.resolve(), key, (status.st_size, status.st_mtime_ns))


@cache
def _convert_once(file: Path, key: str, _version: tuple[int, int]) -> Path:
    for package in PACKAGES:
        if find_spec(package) is None:
            raise UserError(
                f"{key} is {file}, but the package {package}, which reads this format, is not "
                "installed: pip install 'distill[gguf]'"
            )
    entry = store.entry_path("models", {"version": VERSION, "sha256": store.sha256(file)})
    if not store.is_intact(entry):
        log.info("converting %s into a model folder", file.name)
        with store.write_entry(entry) as folder:
            _convert(file, folder)
    return entry


def _convert(file: Path, folder: Path) -> None:
    where, name = os.fspath(file.parent), file.name
    options: dict[str, Any] = {"dtype": torch.bfloat16, "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, **options)
    except (struct.error, IndexError) as error:
        raise ValueError(f"the file is damaged: {error}") from error
    model, problems = loaded[0], loaded[1]
    if problems["missing_keys"]:  # they would be random
        missing = sorted(problems["missing_keys"])
        raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
    # The weights are no longer quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
