"""Save a model and its tokenizer to a folder that transformers loads without this library."""

import errno
import json
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import internals
from distill.models.hub import silence_transformers
from distill.remote_code import container

# The class that config.json names under `auto_map` for compressed students.
REMOTE_CLASS = f"{container.CODE_FILES[0].stem}.{container.CompressedModel.__name__}"


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config, safetensors and tokenizer, and the code that loads a compressed student."""
    with silence_transformers():
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # raised in place of OSError, for a full disk for example
            raise OSError(errno.EIO, str(error), str(folder)) from error
        save_tokenizer(tokenizer, folder)
    write_auto_map(model, folder, container.needs_code(model.config))
    for weights in folder.glob("*.safetensors"):
        # safetensors creates files that only the user can read.
        weights.chmod((folder / "config.json").stat().st_mode)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer that truncates and pads as when it was loaded, not as in its last call."""
    if tokenizer.is_fast:
        backend, loaded = tokenizer.backend_tokenizer, tokenizer.init_kwargs
        if "truncation_strategy" not in loaded:
            backend.no_truncation()
        else:
            backend.enable_truncation(
                loaded["max_length"],
                stride=loaded["stride"],
                strategy=loaded["truncation_strategy"],
                direction=loaded["truncation_side"],
            )
        if "pad_to_multiple_of" not in loaded:
            backend.no_padding()
    tokenizer.save_pretrained(folder)


def has_own_code(folder: Path) -> bool:
    """Whether the code in a folder is identical to this library's, byte for byte.

    No other code is ever run.
    """
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map") or {}
    pairs = ((folder / source.name, source) for source in container.CODE_FILES)
    return set(auto_map.values()) == {REMOTE_CLASS} and all(
        file.is_file() and file.read_bytes() == source.read_bytes() for file, source in pairs
    )


def write_auto_map(model: PreTrainedModel, folder: Path, code: bool) -> None:
    """Write the remote code and `auto_map` in config.json; without `code`, remove `auto_map`."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings.pop("auto_map", None)
    if code:
        settings["auto_map"] = {internals.auto_class(model): REMOTE_CLASS}
        container.copy_code(folder)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
