"""A trained student -> the folder that ships, in the format that the recipe asks for.

| file | what it owns |
|---|---|
| `after.py` | quantization after training, where the recipe wants it |
| `packed.py` | 2 to 8 bits a weight: weights -> the container of `runtime/container.py`, and back to dense |
| `torchao.py` | int8 weights as tensors of torchao |
| `served.py` | what lies beside a runtime's model: tokenizer, labels, the program in `programs/` |
| `coded.py` | layers that compute with int8 codes, as operators of ONNX |
| `norms.py` | layers that normalise, in the operators that ONNX Runtime is fast at |
| `cached.py` | a language model's keys and values as inputs and outputs |
| `onnx.py` | a graph of ONNX |
| `openvino.py` | the same graph as OpenVINO's own |
| `executorch.py` | a program of ExecuTorch |
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from distill import models
from distill.compress.fake_quant import modules_sharing
from distill.compress.quantizer import QuantSpec
from distill.errors import UserError
from distill.packing import executorch, packed, quant_layers, runtime_folder, torchao
from distill.packing.post_training import calibration_inputs, default_layers, quantize_model
from distill.recipe import capabilities, config
from distill.remote_code.modeling import LINEAR, compression_of
from distill.tasks.base import Task


def check_format(
    run: config.Run,
    student: PreTrainedModel,
    tokenizer: Any,
    tensors: Mapping[str, QuantSpec],
    rounded: Collection[str] = (),
) -> None:
    """UserError, before training, where the recipe's format cannot hold this student with these tensors quantized.

    `rounded`: those of them whose layers round their inputs to each token's own range.
    """
    format, quantize = str(run.export.format), run.export.quantize
    later = _later(student, quantize) if quantize is not None else ()
    if format == "torchao":
        torchao.check_layers(student, [*tensors, *(f"{name}.weight" for name in later)])
    if format not in capabilities.RUNTIMES:
        return  # dense and packed hold everything
    runtime_folder.check(format, student, tokenizer)
    for name, spec in tensors.items():
        layers = modules_sharing(student, name)
        if format != "executorch":
            quant_layers.check(name, layers, spec, format)
        elif (quantize is not None or name in rounded) and isinstance(layers[0], LINEAR):
            executorch.check(name, spec)  # any other layer stays in floats


def _later(student: PreTrainedModel, quantize: str) -> Iterable[str]:
    try:
        return default_layers(student)
    except UserError as error:
        raise UserError(
            f"export.quantize is {quantize}, but {str(error).rpartition(': ')[0]}: leave export.quantize out"
        ) from error


def write_artefact(
    run: config.Run, task: Task, tokenizer: Any, student: Path, target: Path
) -> None:
    """Write the student of that folder into an empty one, as the recipe's `export` section says, without a proof."""
    with TemporaryDirectory() as temporary:
        write_format(
            run,
            task,
            tokenizer,
            final_student(run, task, tokenizer, student, Path(temporary)),
            target,
        )


def final_student(
    run: config.Run, task: Task, tokenizer: Any, student: Path, temporary: Path
) -> Path:
    """The folder of the student as it will answer: quantized now, into the other folder, where the recipe wants that after training.

    A runtime's format quantizes as it is written, to what the runtime computes.
    """
    if run.export.quantize is None or run.export.format in capabilities.RUNTIMES:
        return student
    model = models.load_trained(str(student), task, "student", tokenizer)
    if compression_of(model.config).get("weights"):
        raise UserError(
            f"export.quantize is {run.export.quantize}, but the student's weights are quantized already: leave export.quantize out"
        )
    examples = calibration_inputs(run, task, tokenizer) if run.export.quantize == "static" else ()
    quantize_model(model, run.export.quantize, run.export.bits, examples)
    models.save(model, tokenizer, temporary)
    return temporary


def write_format(run: config.Run, task: Task, tokenizer: Any, student: Path, target: Path) -> None:
    """Weights, config and tokenizer. The tokenizer cuts texts where training did."""
    model, tokenizer = (
        models.load_trained(str(student), task, "student", tokenizer),
        copy.deepcopy(tokenizer),
    )
    tokenizer.model_max_length = task.max_length
    dtype = getattr(torch, run.export.dtype)
    if run.export.format in capabilities.RUNTIMES:
        runtime_folder.save(run, task, tokenizer, model, target)
    elif run.export.format == "packed":
        packed.save(model, tokenizer, target, dtype)
    elif run.export.format == "torchao":
        torchao.save(model, tokenizer, target, dtype)
    else:
        _dense(model, tokenizer, target, dtype)


def _dense(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Every weight in one type of float. In half of it weights leave the grid of their codes, which the record then no longer names."""
    compression = compression_of(model.config)
    if compression and dtype != torch.float32:
        model.config.compression = {
            part: said for part, said in compression.items() if part != "weights"
        }
    models.save(model.to(dtype), tokenizer, target)  # type: ignore[arg-type]
