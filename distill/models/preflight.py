"""Checks that teacher, student and data agree: labels, lengths.

Also the fingerprint of a model, which is part of the key of stored results.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.hub import resolve_path, silence_transformers, translate_errors
from distill.models.positions import positions
from distill.tasks.base import Task

# Keys of a config that do not change a model's outputs.
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "architectures")
MAX_SHOWN = 6  # names in a message


def check_labels(model: PreTrainedModel, task: Task, role: str) -> None:
    """Set the task's label names in the model's config, unless only the model's are names.

    Args:
        model: A model whose head has been trained.
        task: A task that is bound to the labels of the data.
        role: `teacher` or `student`, for messages.

    Raises:
        UserError: The label names in the model's config differ from the task's.
    """
    declared = model.config.id2label or {}
    compare_labels(declared, task.names, role)
    if not only_ids(task.names) or only_ids(declared.values()):
        set_labels(model, task)


def set_labels(model: PreTrainedModel, task: Task) -> None:
    """Set the task's label names, where it has any, in the config of a model to be trained."""
    if task.names:
        model.config.id2label = dict(enumerate(task.names))
        model.config.label2id = {name: i for i, name in enumerate(task.names)}


def compare_labels(declared: Any, names: tuple[str, ...], role: str) -> None:
    """Check that label names agree, ignoring case; UserError with the first id that differs.

    Names that only repeat the ids (`LABEL_0`, `0`) agree with any others.

    Args:
        declared: `id2label` of a model.
        names: Label names of the data, by id.
        role: `teacher` or `student`.
    """
    if names and len(declared) != len(names):
        raise UserError(
            f"the {role} has {len(declared)} labels ({_shorten(declared.values())}), but the data "
            f"have {len(names)} ({_shorten(names)}): "
            "take a model without a trained head, or data with the same labels"
        )
    if only_ids(declared.values()) or only_ids(names):
        return
    for i, name in enumerate(names):
        if declared[i].casefold() != name.casefold():
            order = ", ".join(declared[i] for i in sorted(declared))
            raise UserError(
                f"the {role}'s label {i} is {declared[i]}, but the data's label {i} is {name}: "
                f"set data.labels to the {role}'s order, [{order}]"
            )


def better_names(names: tuple[str, ...], model: str) -> tuple[str, ...]:
    """The label names of a model for data whose labels are numbers.

    Args:
        names: Label names of the data.
        model: Folder or name of the model.

    Returns:
        Names in the order of their ids; () if the data have names, or the model no better ones.
    """
    where = resolve_path(model, "teacher.model")
    local = Path(where).is_dir()
    if not names or not only_ids(names) or (local and not (Path(where) / "config.json").is_file()):
        return ()
    with translate_errors(model, "teacher.model", local), silence_transformers():
        declared = AutoConfig.from_pretrained(where, trust_remote_code=False).id2label
    if len(declared) != len(names) or only_ids(declared.values()):
        return ()
    return tuple(declared[i] for i in range(len(names)))


def only_ids(names: Iterable[str]) -> bool:
    """Whether names only repeat the ids: `LABEL_0` or `0`."""
    return all(re.fullmatch(rf"(LABEL_)?{i}", name) for i, name in enumerate(names))


def _shorten(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:MAX_SHOWN]) + (", ..." if len(shown) > MAX_SHOWN else "")


def check_not_quantized(model: PreTrainedModel, role: str) -> None:
    """UserError if the weights are stored by a quantization library and cannot be trained."""
    stored = model.config.to_dict().get("quantization_config")
    if stored:
        raise UserError(
            f"the {role}'s weights are stored by {stored.get('quant_method')}, but here they must "
            "be floats: name the folder `student` of the run that exported it, or a dense or "
            "packed export"
        )


def check_length(model: PreTrainedModel, length: int, role: str) -> None:
    """UserError if the model has fewer positions than `length` tokens."""
    most = max_positions(model)
    if most is not None and length > most:
        raise UserError(
            f"task.max_length is {length}, but the {role} has only {most} positions: "
            f"set task.max_length to {most} or less"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest input in tokens; None if the model does not limit it."""
    return positions(model.config).limit


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the config and of names, dtypes, shapes and bytes of the state dict.

    It does not depend on the device or the memory layout.
    """
    settings = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    relevant = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
