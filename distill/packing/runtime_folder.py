"""A student -> the folder for a runtime: model file, tokenizer and config."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill import models
from distill.errors import UserError
from distill.packing.export_spec import ExportSpec
from distill.packing.graph import GraphOptions, input_names
from distill.recipe import capabilities
from distill.tasks.base import Task

PROGRAMS = Path(__file__).parent / "programs"
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # as OpenVINO calls them


def check(format: str, student: PreTrainedModel, tokenizer: Any) -> None:
    """Raise UserError if a program without transformers cannot run the student."""
    if "attention_mask" not in models.forward_arguments(student):
        raise UserError(
            f"export.format is {format}, but a {type(student).__name__} takes no attention_mask, "
            "and its program pads texts: set export.format=dense"
        )
    check_fast(tokenizer, f"export.format is {format}")


def check_fast(tokenizer: Any, setting: str) -> None:
    """Raise UserError if only transformers can run the tokenizer; `setting` begins the message."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{setting}, but the tokenizer is {type(tokenizer).__name__}, which only transformers "
            "can run: use a fast tokenizer, or set export.format=dense"
        )


def save(spec: ExportSpec, student: PreTrainedModel, target: Path) -> None:
    """Write the model file, tokenizer.json and config.json.

    Args:
        spec: `settings.quantize` is applied here, as the runtime computes; the `model_input_names`
            of `tokenizer` are changed.
        student: changed in place.
        target: an empty folder.
    """
    settings, task, tokenizer = spec.settings, spec.task, spec.tokenizer
    format = str(settings.format)
    check(format, student, tokenizer)
    models.save_tokenizer(tokenizer, target)  # its chat template and settings
    if student.can_generate():
        student.generation_config.save_pretrained(target)
    runtime_tokenizer = task.runtime_tokenizer(tokenizer)
    _set_input_names(tokenizer, len(task.request_columns(spec.data)))
    quantize = capabilities.resolve_quantize(format, settings.quantize)
    options = GraphOptions(
        inputs=input_names(student, tokenizer),
        max_length=task.max_length,
        cache=task.generates,
        quantize=quantize,
        calibration=list(spec.calibration_inputs()) if quantize == "static" else [],
        dtype=settings.stored_dtype,
    )
    cached = import_module(f"distill.packing.{format}").save(student, options, target)
    runtime_tokenizer.save(str(target / "tokenizer.json"))
    content = runtime_config(task, tokenizer, student, settings.stored_dtype, cached)
    (target / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def _set_input_names(tokenizer: Any, cells: int) -> None:
    """Set the tokenizer's outputs to the inputs of training: token types for pairs only."""
    pairs = cells == 2 and "token_type_ids" in tokenizer.model_input_names
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if pairs else [])]
    tokenizer.model_input_names = names


def runtime_program(format: str, task: Task) -> str:
    """The source of the program that runs texts in the folder of an export."""
    return (PROGRAMS / f"{task.program}_{format}.py").read_text()


def runtime_config(
    task: Task, tokenizer: Any, student: PreTrainedModel, dtype: str, cached: bool
) -> dict[str, Any]:
    """The content of config.json.

    `positions` is the maximum number of tokens, None if there is none; `cached` is whether keys and
    values are inputs and outputs of the graph.
    """
    return {
        "model_type": student.config.model_type,
        "id2label": task.runtime_labels(student.config),
        "problem_type": task.model_kwargs().get("problem_type"),
        "max_length": task.max_length,
        "positions": models.max_positions(student),
        "cached": cached,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "stop_token_ids": models.stop_tokens(student, tokenizer),
        "precision": PRECISIONS[dtype],
    }
