"""A student -> the folder that a runtime answers from: the model by its format's module, the tokenizer and what labels mean."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import models
from distill.errors import UserError
from distill.packing.post_training import calibration_inputs
from distill.recipe import capabilities, config
from distill.tasks.base import Task
from distill.tasks.language import start_token

PROGRAMS = Path(__file__).parent / "programs"
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # as OpenVINO calls them


def check(format: str, student: PreTrainedModel, tokenizer: Any) -> None:
    """UserError where a program without transformers could not ask the student as training does."""
    if "attention_mask" not in models.forward_arguments(student):
        raise UserError(
            f"export.format is {format}, but a {type(student).__name__} takes no attention_mask, and its program pads texts: "
            "set export.format=dense"
        )
    check_fast(tokenizer, f"export.format is {format}")


def check_fast(tokenizer: Any, asked: str) -> None:
    """UserError where only transformers can run the tokenizer; `asked` is what wants another to."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{asked}, but the tokenizer is {type(tokenizer).__name__}, which only transformers can run: "
            "use a fast tokenizer, or set export.format=dense"
        )


def save(
    run: config.Run, task: Task, tokenizer: Any, student: PreTrainedModel, target: Path
) -> None:
    """The model file, tokenizer.json and config.json. `export.quantize` is applied here, as the runtime computes."""
    settings, format = run.export, str(run.export.format)
    check(format, student, tokenizer)
    told = runtime_tokenizer(task, tokenizer)
    pairs = (
        task.pipeline == "text-classification"
        and len(run.data.text) == 2
        and "token_type_ids" in tokenizer.model_input_names
    )
    tokenizer.model_input_names = [
        "input_ids",
        "attention_mask",
        *(["token_type_ids"] if pairs else []),
    ]  # what training gave it
    quantize = capabilities.resolve_quantize(format, settings.quantize)
    examples = list(calibration_inputs(run, task, tokenizer)) if quantize == "static" else []
    options = {"dtype": settings.dtype} if len(capabilities.RUNTIMES[format].dtypes) > 1 else {}
    cached = import_module(f"distill.packing.{format}").save(
        student, task, tokenizer, target, quantize, examples, **options
    )
    told.save(str(target / "tokenizer.json"))
    (target / "config.json").write_text(
        json.dumps(runtime_config(task, tokenizer, student, settings.dtype, cached), indent=1)
        + "\n"
    )


def input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """What the model is given: the columns that it knows, of those that :func:`save` leaves."""
    return [name for name in tokenizer.model_input_names if name in models.forward_arguments(model)]


class LogitsModule(nn.Module):
    """Inputs by their place -> logits, as a graph or a program has them."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return models.logits(self.model, dict(zip(self.names, inputs, strict=True)))


def runtime_program(format: str, pipeline: str) -> str:
    """The program that answers texts from the folder, which it is run in; that of a language model also continues them."""
    continues = PROGRAMS / f"{format}_generate.py"
    return (
        continues
        if pipeline == "text-generation" and continues.exists()
        else PROGRAMS / f"{format}.py"
    ).read_text()


def runtime_config(
    task: Task, tokenizer: Any, student: PreTrainedModel, dtype: str, cached: bool
) -> dict[str, Any]:
    """What the program, or another one, needs to know; `id2label` is empty for language models.

    `positions`: the most tokens that the model reads, null where any number; `cached`: keys and values are inputs and outputs.
    """
    classifies = task.pipeline == "text-classification"
    return {
        "model_type": student.config.model_type,
        "id2label": dict(enumerate(task.names)) or student.config.id2label if classifies else {},
        "problem_type": getattr(task, "problem_type", None),
        "max_length": task.max_length,
        "positions": models.max_positions(student),
        "cached": cached,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "precision": PRECISIONS[dtype],
    }


def runtime_tokenizer(task: Task, tokenizer: Any) -> Tokenizer:
    """One whose `encode_batch` gives what the student was trained on: marked, cut and padded.

    Of a text that is too long a language model reads the end, where it is to go on.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    continues = task.pipeline == "text-generation"
    if continues:
        marks = tokenizer.convert_ids_to_tokens(start_token(tokenizer))
        special = [(mark, backend.token_to_id(mark)) for mark in marks]
        backend.post_processor = processors.TemplateProcessing(
            single=[*marks, "$A"], special_tokens=special
        )
    backend.enable_truncation(
        task.max_length, direction="left" if continues else tokenizer.truncation_side
    )
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return backend
