"""A model in the form that each runtime loads: an export, or for PyTorch its folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill import models, packing
from distill.evaluate.cost import disk_bytes, weight_bytes
from distill.evaluate.runtime_names import export_settings
from distill.models import has_own_code
from distill.packing import runtime_folder
from distill.packing.export_spec import ExportSpec
from distill.recipe import capabilities
from distill.tasks.base import Task


@dataclass(frozen=True)
class RuntimeModel:
    """A model for one runtime, as `isolated/scripts/runtime_models.py` reads it.

    Args:
        form: Name of the runtime, such as `torch_bf16` or `onnx_int8`.
        folder: Folder of the model.
        weight_bytes: Bytes of its weights' files.
        answer: Which outputs are compared: `logits`, or the `next_token`.
        program: Source of the program that a runtime runs in the folder; None for PyTorch.
        auto_class: For PyTorch, the class of transformers that loads the model.
        tokenizer: For PyTorch, the tokenizer.json that programs use too.
        trust_remote_code: For PyTorch, whether code in the folder may run.
    """

    form: str
    folder: str
    weight_bytes: int
    answer: str
    program: str | None = None
    auto_class: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False


def torch_model(task: Task, tokenizer: Any, path: str, tokenizer_file: Path) -> RuntimeModel:
    """A model in PyTorch in float32; the tokenizer is written to a file."""
    folder = models.local_files(path, "model")
    runtime_folder.check_fast(tokenizer, "runtimes is given")
    task.runtime_tokenizer(tokenizer).save(str(tokenizer_file))
    return RuntimeModel(
        form="torch",
        folder=str(folder.resolve()),
        weight_bytes=weight_bytes(folder),
        answer=task.answer,
        auto_class=task.auto_class,
        tokenizer=str(tokenizer_file),
        trust_remote_code=has_own_code(folder),
    )


def torch_variant(model: RuntimeModel, form: str) -> RuntimeModel:
    """The same folder for another form of PyTorch; bfloat16 takes half the bytes."""
    share = 2 if form.endswith("bf16") else 1
    return replace(model, form=form, weight_bytes=model.weight_bytes // share)


def export_model(spec: ExportSpec, student: Path, name: str, folder: Path) -> RuntimeModel:
    """Write a student for a runtime into a new folder, without a proof.

    Args:
        spec: What the export needs; its settings are replaced by those of the runtime.
        student: Folder of the student.
        name: Name of the runtime.
        folder: Folder to create.
    """
    settings = export_settings(name)
    format = str(settings.format)
    folder.mkdir()
    packing.write_artefact(replace(spec, settings=settings), student, folder)
    return RuntimeModel(
        form=name,
        folder=str(folder),
        weight_bytes=disk_bytes(folder, capabilities.RUNTIMES[format].weight_files),
        answer=spec.task.answer,
        program=runtime_folder.runtime_program(format, spec.task),
    )
