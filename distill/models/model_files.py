"""What a name leads to, seen from its files alone: a model, or an adapter, a part of one, nothing.

Everything here reads config files only, and works before data and weights are loaded.
"""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from transformers import CONFIG_MAPPING, PreTrainedConfig

from distill import internals
from distill.errors import UserError
from distill.models.hub import (
    json_problem,
    resolve_path,
    silence_transformers,
    translate_errors,
)
from distill.models.weight_files import check_json
from distill.remote_code import container

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "*.onnx", "*.pt", "*.h5", "*.msgpack")


def check_files(name: str, key: str) -> dict[str, Any]:
    """Check that a name leads to the config of a model that this library can load.

    Args:
        name: A folder, `package:<distribution>/<folder>` or a name on the Hub.
        key: The recipe's key of that name.

    Returns:
        The contents of its config.json.

    Raises:
        UserError: It is an adapter, has no config, or its architecture is not one of transformers.
    """
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    if local:
        _refuse_adapter(Path(where) / ADAPTER, name, key)
        if not (Path(where) / CONFIG).is_file():
            way_out = _folder_below(Path(where), name)
            raise UserError(f"{key} is {name}, but this folder has no {CONFIG}: {way_out}")
        check_json(Path(where), name, key)
    try:
        with translate_errors(name, key, local), silence_transformers():
            content, _ = PreTrainedConfig.get_config_dict(where)
    except UserError:
        if not local:
            _refuse_adapter(_fetched(where, ADAPTER), name, key)
        raise
    _check_architecture(content, name, key)
    return content


def _fetched(name: str, file: str) -> Path | None:
    """A file of a repository on the Hub; None if it cannot be fetched."""
    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError):  # those of the Hub are subclasses
        return None


def _refuse_adapter(file: Path | None, name: str, key: str) -> None:
    """UserError if there is the config of a PEFT adapter, whose weights are only a difference."""
    if file is None or not file.is_file():
        return
    problem = json_problem(file)
    if problem:
        raise UserError(f"{key} is {name}, but its {ADAPTER} {problem}: save the adapter again")
    adapter = json.loads(file.read_text(encoding="utf-8"))
    kind, base = adapter.get("peft_type") or "PEFT", adapter.get("base_model_name_or_path")
    raise UserError(
        f"{key} is {name}, but it holds a {kind} adapter of {base or 'a model without a name'}, "
        "not a model: save both as one with peft (PeftModel.merge_and_unload, then "
        f"save_pretrained){f', or name {base}' if base else ''}"
    )


def _folder_below(folder: Path, name: str) -> str:
    """A way out for a folder without a config: one below it that has one."""
    below = [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG}")]
    weights = [each for each in below if any(next(each.glob(k), None) for k in _WEIGHTS[:2])]
    if below:
        # of several checkpoints, whose names end in a number, the last
        chosen = max(weights or below, key=lambda each: (_number(each.name), -len(each.parts)))
        inside = chosen.relative_to(folder)
        return f"its folder {inside} has one, so name {name.rstrip('/')}/{inside}"
    others = sorted({file.name for kind in _WEIGHTS for file in folder.glob(kind)})
    if others:
        return f"it holds {others[0]}; put the model's {CONFIG} beside it"
    return "name a folder that save_pretrained wrote"


def _number(name: str) -> int:
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else -1


def _check_architecture(content: Mapping[str, Any], name: str, key: str) -> None:
    """UserError unless transformers itself has the architecture that a config names."""
    model_type = content.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    classes = sorted({str(path) for path in (content.get("auto_map") or {}).values()})
    if classes:
        raise UserError(
            f"{key} is {name}, but its architecture {model_type} is code of its own "
            f"({classes[0].partition('--')[2] or classes[0]}), which is never run here: "
            "name a model of an architecture that transformers has, or save this one as such"
        )
    if model_type is None:
        raise UserError(
            f"{key} is {name}, but its {CONFIG} has no model_type: "
            "name a folder that save_pretrained wrote"
        )
    raise UserError(
        f"{key} is {name}, but its model_type is {model_type}, which transformers "
        f"{transformers.__version__} does not have: upgrade transformers, or take another model"
        f"{_similar(str(model_type))}"
    )


def _similar(model_type: str) -> str:
    close = get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def check_head(config: PreTrainedConfig, auto_class: str, key: str, value: Any) -> None:
    """UserError unless transformers has a model of this config with the task's head."""
    if container.needs_code(config) or internals.model_class(auto_class, config) is not None:
        return
    raise UserError(
        f"{key} is {value}, but transformers has no {auto_class} of a {config.model_type}: "
        "choose another architecture, or another task"
    )
