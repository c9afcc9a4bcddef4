"""What an export's format can hold, as far as the recipe alone tells: refused before training, and before torch is imported."""

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from distill.errors import UserError

QUANTIZER = "Quantize"
OTHERS = "set export.format=packed or dense"


@dataclass(frozen=True)
class Runtime:
    """A format that is answered without torch and transformers by a runtime of its own; our extra has the format's name."""

    name: str  # the runtime's package
    needs: dict[str, str]  # packages that write and run it -> the oldest version that can
    files: str  # what holds the weights, as a pattern
    quantize: tuple[str, ...]  # values of export.quantize; the first of them is what int8 means
    dtypes: tuple[str, ...] = ("float32",)
    blocked: tuple[str, ...] = (
        "distill",
        "torch",
        "transformers",
    )  # what its program must do without

    @property
    def libraries(self) -> list[str]:
        """What its program needs: the runtime of ExecuTorch imports torch, but does not ask for it when it is installed."""
        return [
            self.name,
            *(["torch"] if "torch" not in self.blocked else []),
            "numpy",
            "tokenizers",
        ]


EXPORTER = {"onnx": "1.18", "onnxscript": "0.5"}
RUNTIMES = {
    "onnx": Runtime(
        "onnxruntime",
        {**EXPORTER, "onnxruntime": "1.20"},
        "model.onnx*",
        ("dynamic", "static", "weights"),
    ),
    "openvino": Runtime(
        "openvino",
        {**EXPORTER, "openvino": "2025.0"},
        "openvino_model.*",
        ("static", "weights"),
        ("float32", "bfloat16"),
    ),
    "executorch": Runtime(
        "executorch",
        {"executorch": "1.5", "torchao": "0.18"},
        "model.pte",
        ("dynamic",),
        blocked=("distill", "transformers"),
    ),
}


def check(
    callbacks: dict[str, Any], format: str | None, dtype: str, quantize: str | None, bits: int
) -> None:
    """UserError where the techniques of a recipe leave something that its export cannot store.

    `dtype`, `quantize` and `bits` are those of the recipe's `export` section: what is quantized only after training.
    """
    trained = {
        name: spec
        for name, spec in callbacks.items()
        if str(spec.get("_target_")).rpartition(".")[2] == QUANTIZER
    }
    if quantize is None and bits != 8:
        raise UserError(
            f"export.bits is {bits}, but nothing is quantized after training: set export.quantize too, or leave bits out"
        )
    if format in RUNTIMES:
        _check_runtime(str(format), trained, dtype, quantize, bits)
        return
    if quantize is not None and trained:
        raise UserError(
            f"export.quantize is {quantize}, but callbacks.{next(iter(trained))} quantizes in training: leave one of them out"
        )
    if quantize == "int8":
        raise UserError(
            f"export.quantize is int8, but that is for {', '.join(RUNTIMES)}: choose weights, dynamic or static"
        )
    if format == "torchao":
        _check_torchao(trained, dtype, quantize, bits)


def resolve_quantize(format: str, quantize: str | None) -> str | None:
    """`export.quantize` for a runtime, with what int8 means for it."""
    return RUNTIMES[format].quantize[0] if quantize == "int8" else quantize


def _check_runtime(
    format: str, trained: dict[str, Any], dtype: str, quantize: str | None, bits: int
) -> None:
    """Layers that a pattern names are known only later, and embeddings may have fewer bits: the rest is checked as they are written."""
    runtime = RUNTIMES[format]
    _check_installed(format, runtime)
    if dtype not in runtime.dtypes:
        raise _refused(
            f"export.dtype is {dtype}, and {runtime.name} is given {' or '.join(runtime.dtypes)} only",
            "choose that",
            format,
        )
    if quantize not in (None, "int8", *runtime.quantize):
        choices = ", ".join(("int8", *runtime.quantize))
        raise _refused(
            f"export.quantize is {quantize}, which {runtime.name} runs no faster",
            f"choose one of {choices}",
            format,
        )
    if bits != 8:
        raise _refused(
            f"export.bits is {bits}, and {runtime.name} computes with 8",
            "set export.format=packed, or export.bits=8",
            format,
        )
    for name, spec in trained.items():
        if spec.get("method", "linear") != "linear":
            raise _refused(
                f"callbacks.{name} quantizes with {spec['method']}, which {runtime.name} cannot compute with",
                OTHERS,
                format,
            )
        if spec.get("bits", 8) != 8 and spec.get("layers") is None:
            way_out = f"{OTHERS}, or callbacks.{name}.bits=8; embeddings alone may have fewer"
            raise _refused(
                f"callbacks.{name}.bits is {spec['bits']}, and {runtime.name} multiplies by 8",
                way_out,
                format,
            )
        _check_grid(format, runtime, name, spec, quantize)


def _check_grid(
    format: str, runtime: Runtime, name: str, spec: dict[str, Any], quantize: str | None
) -> None:
    """XNNPACK multiplies floats where a layer's inputs are not rounded, and rounds them to each token's range or not at all."""
    where, inputs, floats = f"callbacks.{name}", spec.get("activations"), format == "executorch"
    if floats and quantize is not None and inputs == "static":
        reason = f"{where}.activations is static and export.quantize is {quantize}, and {runtime.name} rounds to each token's own range"
        raise _refused(
            reason, f"leave export.quantize out, or choose {where}.activations=dynamic", format
        )
    if spec.get("layers") is not None or (floats and quantize is None and inputs != "dynamic"):
        return
    if spec.get("symmetric") is False:
        reason = f"{where}.symmetric is False, and {runtime.name} multiplies by codes that are centred on 0"
        raise _refused(reason, f"{OTHERS}, or leave it out", format)
    if (spec.get("group") or 0) > 0:
        reason = f"{where}.group is {spec['group']}, and {runtime.name} multiplies by rows that have one grid each"
        raise _refused(reason, f"{OTHERS}, or {where}.group=0", format)


def _check_installed(format: str, runtime: Runtime) -> None:
    for package, least in runtime.needs.items():
        found = installed_version(package)
        if found is None:
            raise UserError(
                f"export.format is {format}, but {package} is not installed: pip install 'distill[{format}]'"
            )
        if Version(found) < Version(least):
            way_out = f"pip install --upgrade 'distill[{format}]'"
            raise UserError(
                f"export.format is {format}, but {package} is {found}, and {least} is the oldest that can be used: {way_out}"
            )


def installed_version(package: str) -> str | None:
    """Its version; null where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check_torchao(trained: dict[str, Any], dtype: str, quantize: str | None, bits: int) -> None:
    if installed_version("torchao") is None:
        raise _refused(
            "the package torchao is not installed",
            "pip install 'distill[torchao]', or choose export.format=packed",
        )
    if dtype != "float32":
        raise _refused(
            f"export.dtype is {dtype}, in which its tensors do not compute",
            "leave export.dtype at float32",
        )
    if not trained and quantize is None:
        raise _refused(
            "nothing is quantized",
            "add a callback distill.callbacks.Quantize, or set export.quantize=weights",
        )
    if quantize is not None:
        _check_int8("export.quantize", "export.bits", bits, "linear", quantize)
    for name, spec in trained.items():
        where = f"callbacks.{name}"
        _check_int8(
            f"{where}.activations",
            f"{where}.bits",
            spec.get("bits", 8),
            spec.get("method", "linear"),
            spec.get("activations"),
        )


def _check_int8(inputs_key: str, bits_key: str, bits: int, method: str, inputs: str | None) -> None:
    if method != "linear":
        raise _refused(
            f"the weights are quantized with {method}, and torchao knows linear codes only", OTHERS
        )
    if bits != 8:
        raise _refused(
            f"{bits_key} is {bits}, and torchao stores a {bits}-bit value in a whole byte", OTHERS
        )
    if inputs == "static":
        raise _refused(
            f"{inputs_key} is static, and torchao rounds inputs to the range of each token only",
            f"{OTHERS}, or dynamic",
        )


def _refused(reason: str, way_out: str, format: str = "torchao") -> UserError:
    return UserError(f"export.format is {format}, but {reason}: {way_out}")
