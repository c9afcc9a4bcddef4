"""What `runtimes=` may name, and how the student is written for each: known before torch is imported."""

from contextlib import suppress

from distill.errors import UserError
from distill.recipe import capabilities, config

TORCH = (
    "torch",
    "torch_bf16",
    "torch_compile",
    "torch_compile_bf16",
    "torch_compile_int8",
)  # compiled: with frozen weights
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
HOW: dict[str, dict[str, str]] = {
    "": {},
    "bf16": {"dtype": "bfloat16"},
    **{how: {"quantize": how} for how in config.QUANTIZE},
}


def check_runtimes(run: config.Run, names: list[str]) -> None:
    """UserError where a runtime is unknown or not installed, or cannot hold the student's techniques."""
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"runtimes is [{', '.join(names)}], but it must name each once: give runtimes=torch,onnx"
        )
    for name in names:
        check_runtime(run, name)


def check_runtime(run: config.Run, name: str) -> None:
    if name == "torch_compile_int8":
        if capabilities.installed_version("torchao") is None:
            raise UserError(
                f"runtimes has {name}, but torchao is not installed: pip install 'distill[torchao]'"
            )
        if any(spec.get("activations") for spec in run.callbacks.values()):
            raise UserError(
                f"runtimes has {name}, but the student's inputs are rounded as it was trained already: leave it out"
            )
    if name not in TORCH:
        wanted = export_of(name)
        capabilities.check(run.callbacks, wanted.format, wanted.dtype, wanted.quantize, wanted.bits)


def available_runtimes(run: config.Run) -> list[str]:
    """What is worth trying here: of AUTO all that is installed and can hold the student's techniques."""
    found = []
    for name in AUTO:
        with suppress(UserError):
            check_runtime(run, name)
            found.append(name)
    return found


def export_of(name: str) -> config.Export:
    """How the student is written for a runtime: `onnx_int8` is format=onnx quantize=int8."""
    format, _, how = name.partition("_")
    if format not in capabilities.RUNTIMES or how not in HOW:
        known = ", ".join((*TORCH, *capabilities.RUNTIMES))
        raise UserError(
            f"runtimes has {name}, but there is none of that name: choose from {known}, and add how, as in onnx_int8"
        )
    return config.Export(format=format, **HOW[how])  # type: ignore[arg-type]
