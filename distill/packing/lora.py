"""The adapter of a run -> a folder that peft and transformers add to its base model."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distill import models
from distill.errors import UserError
from distill.models.adapters import FOLDER

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(tokenizer: Any, student: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the adapter and the student's tokenizer.

    There is no config.json: with one, transformers would look for whole weights in the folder.

    Args:
        tokenizer: the student's.
        student: the folder of the student, beside which the adapter is.
        target: an empty folder.
        dtype: float type of the adapter's weights.

    Raises:
        UserError: if the run has no adapter.
    """
    adapter = student.with_name(FOLDER)
    if not (adapter / SETTINGS).is_file():
        raise UserError(
            f"export.format is lora, but {student.parent} has no adapter of a language model: "
            "train one with student.lora, or set export.format=dense"
        )
    models.save_tokenizer(tokenizer, target)
    shutil.copyfile(adapter / SETTINGS, target / SETTINGS)
    tensors = {name: each.to(dtype) for name, each in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
