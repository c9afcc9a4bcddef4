"""A trained student -> the exported folder, in the format that the recipe names.

| module | contents |
|---|---|
| `export_spec.py` | what an export needs besides the student's folder |
| `post_training.py` | quantization after training |
| `packed.py` | `format=packed`: 2 to 8 bits per weight, and back to ordinary weights |
| `file_header.py` | the header of a safetensors file, in an order of its own |
| `lora.py` | `format=lora`: the adapter alone |
| `torchao.py` | `format=torchao`: int8 weights as tensors of torchao |
| `runtime_folder.py` | the files beside a runtime's model: tokenizer, config, program |
| `programs/` | the programs that run texts in a runtime |
| `graph.py` | code shared by the modules that write a runtime's model file |
| `onnx.py` | an ONNX graph |
| `openvino.py` | the same graph in OpenVINO's format |
| `executorch.py` | an ExecuTorch program |
| `quant_layers.py` | layers with int8 weights, as operators of ONNX |
| `layer_norm.py` | layer normalization in operators that ONNX Runtime vectorizes |
| `kv_cache.py` | a language model's keys and values as inputs and outputs |
"""

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from distill import models
from distill.compress.fake_quant import modules_sharing
from distill.compress.quantizable import default_layers
from distill.compress.quantizer import QuantSpec
from distill.errors import RunFailed, UserError
from distill.packing import lora, packed, runtime_folder, torchao
from distill.packing.export_spec import ExportSpec
from distill.packing.graph import check_quantized
from distill.packing.post_training import quantize_model
from distill.recipe import capabilities, config
from distill.remote_code.modeling import CompressionConfig

__all__ = [
    "ExportSpec",
    "check_format",
    "final_student",
    "is_measured",
    "temporary_artefact",
    "write_artefact",
    "write_format",
]

log = logging.getLogger("distill")


def check_format(
    settings: config.Export,
    student: PreTrainedModel,
    tokenizer: Any,
    tensors: Mapping[str, QuantSpec],
    dynamic: Collection[str] = (),
) -> None:
    """Check, before training, that a format can store the student with these tensors quantized.

    Args:
        settings: the recipe's section `export`.
        student: the student before training.
        tokenizer: the student's tokenizer.
        tensors: names of the quantized weights, and how each is quantized.
        dynamic: names of those whose layers quantize their inputs dynamically, for each token.

    Raises:
        UserError: if the format does not support it.
    """
    format, quantize = str(settings.format), settings.quantize
    later = _default_layers(student, quantize) if quantize is not None else ()
    if format == "torchao":
        torchao.check_layers(student, [*tensors, *(f"{name}.weight" for name in later)])
    if format not in capabilities.RUNTIMES:
        return  # dense and packed store everything
    runtime_folder.check(format, student, tokenizer)
    for name, spec in tensors.items():
        layers = modules_sharing(student, name)
        activations = "dynamic" if name in dynamic else None
        check_quantized(format, name, layers, spec, quantize, activations)


def _default_layers(student: PreTrainedModel, quantize: str) -> Iterable[str]:
    try:
        return default_layers(student)
    except UserError as error:
        reason = str(error).rpartition(": ")[0]
        raise UserError(
            f"export.quantize is {quantize}, but {reason}: leave export.quantize out"
        ) from error


def write_artefact(spec: ExportSpec, student: Path, target: Path) -> None:
    """Export the student of a folder into an empty one, in the format of `spec`, without proof."""
    with TemporaryDirectory() as temporary:
        write_format(spec, final_student(spec, student, Path(temporary)), target)


def is_measured(settings: config.Export) -> bool:
    """Whether an evaluation measures the export instead of the trained student.

    It does not if the export stores the student unchanged (dense, float32), or only its adapter.
    Exports for a runtime are measured by `evaluate runtimes=`.
    """
    if settings.format in (None, "lora", *capabilities.RUNTIMES):
        return False
    plain = settings.format == "dense" and settings.stored_dtype == "float32"
    return not plain or settings.quantize is not None


@contextmanager
def temporary_artefact(spec: ExportSpec, student: Path) -> Iterator[Path | None]:
    """Export the student of a folder to a temporary one, in which it is measured.

    Yields:
        The temporary folder; None if the trained student is measured instead, because
        :func:`is_measured` is false or the export cannot be written.
    """
    if not is_measured(spec.settings):
        yield None
        return
    with TemporaryDirectory() as temporary:
        target: Path | None = Path(temporary)
        try:
            write_artefact(spec, student, Path(temporary))
        except (UserError, RunFailed) as error:
            target = None
            warn_unwritten(error)
        yield target


def warn_unwritten(error: Exception) -> None:
    """Log that the trained student is measured, because it cannot be exported."""
    log.warning("the trained student is measured, because it cannot be exported: %s", error)


def final_student(spec: ExportSpec, student: Path, temporary: Path) -> Path:
    """The folder of the student that the export must agree with.

    That is `student`, or `temporary` with the student quantized after training. For a runtime, the
    export is quantized when it is written, as the runtime computes.
    """
    settings = spec.settings
    if settings.quantize is None or settings.format in capabilities.RUNTIMES:
        return student
    model = models.load_trained(str(student), spec.task, "student", spec.tokenizer)
    if CompressionConfig.from_config(model.config).weights:
        raise UserError(
            f"export.quantize is {settings.quantize}, but the student's weights are quantized "
            "already: leave export.quantize out"
        )
    examples = spec.calibration_inputs() if settings.quantize == "static" else ()
    quantize_model(model, settings.quantize, settings.bits, examples)
    models.save(model, spec.tokenizer, temporary)
    return temporary


def write_format(spec: ExportSpec, student: Path, target: Path) -> None:
    """Write weights, config and tokenizer.

    Texts to classify are truncated to the length of training, prompts to that of the model.
    """
    settings, tokenizer = spec.settings, copy.deepcopy(spec.tokenizer)
    model = models.load_trained(str(student), spec.task, "student", spec.tokenizer)
    if not spec.task.generates:
        tokenizer.model_max_length = spec.task.max_length
    dtype = getattr(torch, settings.stored_dtype)
    if settings.format in capabilities.RUNTIMES:
        runtime_folder.save(replace(spec, tokenizer=tokenizer), model, target)
    elif settings.format == "packed":
        packed.save(model, tokenizer, target, dtype)
    elif settings.format == "lora":
        lora.save(tokenizer, student, target, dtype)
    elif settings.format == "torchao":
        torchao.save(model, tokenizer, target, dtype)
    else:
        _save_dense(model, tokenizer, target, dtype)


def _save_dense(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Write all weights in one floating-point type.

    In half precision the weights are no longer exactly quantized, so the config omits that.
    """
    compression = CompressionConfig.from_config(model.config)
    if compression.weights and dtype != torch.float32:
        replace(compression, weights={}).write_to(model.config)
    models.save(model.to(dtype), tokenizer, target)  # type: ignore[arg-type]
