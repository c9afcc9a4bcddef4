"""Names that `runtimes=` accepts, checked before torch is imported."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from distill.errors import UserError
from distill.recipe import capabilities, config

TORCH = ("torch", "torch_bf16", "torch_compile", "torch_compile_bf16", "torch_compile_int8")
AUTO = (
    "torch",
    "torch_bf16",
    "torch_compile_bf16",
    "torch_compile_int8",
    "onnx",
    "onnx_int8",
    "openvino",
    "openvino_int8",
    "executorch_int8",
)
# suffix of the other runtimes -> settings of the export
SUFFIXES: dict[str, dict[str, str]] = {
    "": {},
    "bf16": {"dtype": "bfloat16"},
    **{quantize: {"quantize": quantize} for quantize in config.QUANTIZE},
}

Callbacks = Mapping[str, dict[str, Any]]  # the recipe's section `callbacks`


def check_runtimes(names: Sequence[str], callbacks: Callbacks) -> None:
    """Check that runtimes exist, are installed, and support the student's techniques.

    Raises:
        UserError: if one does not.
    """
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"runtimes is [{', '.join(names)}], but it must name each once: "
            "give runtimes=torch,onnx"
        )
    for name in names:
        _check_runtime(name, callbacks)


def available_runtimes(callbacks: Callbacks) -> list[str]:
    """The runtimes of AUTO that are installed and support the student's techniques."""
    available = []
    for name in AUTO:
        with suppress(UserError):
            _check_runtime(name, callbacks)
            available.append(name)
    return available


def _check_runtime(name: str, callbacks: Callbacks) -> None:
    techniques = capabilities.techniques_of(dict(callbacks))
    if name == "torch_compile_int8":
        if capabilities.installed_version("torchao") is None:
            raise UserError(
                f"runtimes has {name}, but torchao is not installed: pip install 'distill[torchao]'"
            )
        if any(technique.activations for technique in techniques):
            raise UserError(
                f"runtimes has {name}, but the student's activations were quantized in training: "
                "leave it out"
            )
    if name not in TORCH:
        export = export_settings(name)
        capabilities.check_export(export.format, export.dtype, export.quantize, export.bits)
        capabilities.check_techniques(export.format, export.quantize, techniques)


def export_settings(name: str) -> config.Export:
    """The export that a runtime loads: `onnx_int8` is format=onnx quantize=int8."""
    format, _, suffix = name.partition("_")
    if format not in capabilities.RUNTIMES or suffix not in SUFFIXES:
        known = ", ".join((*TORCH, *capabilities.RUNTIMES))
        raise UserError(
            f"runtimes has {name}, but there is no such runtime: choose from {known}, "
            "the last with a suffix, as in onnx_int8"
        )
    return config.Export(format=format, **SUFFIXES[suffix])  # type: ignore[arg-type]
