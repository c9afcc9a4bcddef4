"""The float type in which an export stores weights, and in which models are measured or teach."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from distill.models.hub import resolve_path, translate_errors
from distill.models.model_files import check_files
from distill.recipe import config
from distill.recipe.formats import DTYPES, FORMATS

_STORED = {"BF16": "bfloat16", "F16": "float16"}  # safetensors' names


def resolve_export_dtype(
    settings: config.Export, teacher: config.Teacher | None, student: config.Student
) -> config.Export:
    """Replace `export.dtype=auto` by the dtype of the teacher's checkpoint.

    Without a teacher here it is that of the student's checkpoint; float32 for models from a config,
    and for formats that cannot store it. An adapter always has the dtype of its base model.
    """
    if settings.format == "lora" and student.model is not None:
        return replace(settings, dtype=checkpoint_dtype(student.model, "student.model"))
    if settings.dtype != "auto":
        return settings
    model, key = student.model, "student.model"
    if teacher is not None and teacher.outputs != "served":
        model, key = teacher.model, "teacher.model"
    return with_dtype_of(settings, model, key)


def with_dtype_of(settings: config.Export, model: str | None, key: str) -> config.Export:
    """Replace `export.dtype=auto` by the dtype of a model's checkpoint."""
    if settings.dtype != "auto":
        return settings
    dtype = "float32" if model is None else checkpoint_dtype(model, key)
    stored = FORMATS[settings.format or "dense"].dtypes
    return replace(settings, dtype=dtype if dtype in stored else "float32")


def checkpoint_dtype(model: str, key: str) -> str:
    """The dtype that a model's config declares, or else that of its first stored float tensor.

    Args:
        model: A folder or a name.
        key: The key that names it, for messages.
    """
    check_files(model, key)
    path = resolve_path(model, key)
    with translate_errors(model, key, Path(path).is_dir()):
        declared = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
    name = str(declared or _first_dtype(Path(path))).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _first_dtype(folder: Path) -> str:
    """From the headers of the files, without their tensors."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                dtype = stored.get_slice(name).get_dtype()
                if "F" in dtype:  # BF16, F16, F32, F64, F8_E4M3, ...; others are I64, BOOL, ...
                    return _STORED.get(dtype, "float32")
    return "float32"


def measured_dtype(folder: Path, dtype: str) -> str:
    """The dtype in which the model of a folder is measured: `dtype`, unless it is compressed.

    Compressed layers compute in float32, whatever their weights are stored in.
    """
    settings = json.loads((folder / "config.json").read_text())
    compressed = settings.get("auto_map") or settings.get("quantization_config")
    return "float32" if compressed else dtype


def in_dtype(teacher: PreTrainedModel, name: str, copies: bool) -> PreTrainedModel:
    """Convert the teacher to another dtype.

    Args:
        teacher: changed in place if it is not copied.
        name: name of the dtype, such as bfloat16.
        copies: whether a teacher in another dtype is copied.
    """
    dtype = getattr(torch, name)
    if copies and dtype != teacher.dtype:
        teacher = copy.deepcopy(teacher)
    return teacher.to(dtype)
