"""What each export format supports: one table, checked by :mod:`distill.recipe.capabilities`."""

from dataclasses import dataclass

__all__ = ["DTYPES", "FORMATS", "RUNTIMES", "Format", "WeightSupport"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class WeightSupport:
    """Which quantized weights a kind of layer supports.

    Args:
        methods: quantization methods.
        bits: bits per weight.
        affine: whether a zero point may differ from 0.
        groups: whether a row may have several scales.
    """

    methods: tuple[str, ...] = ("linear", "codebook", "nf4")
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    affine: bool = True
    groups: bool = True


@dataclass(frozen=True)
class Format:
    """One value of `export.format`.

    Args:
        packages: packages that write and run it -> the oldest version supported. The extra with
            the format's name installs them.
        runtime: the package that runs it without transformers; None where transformers loads it.
        weight_files: pattern of the files that hold a runtime's weights.
        blocked: packages that the exported program must run without.
        dtypes: values of `export.dtype`, the type of the weights that are not quantized.
        quantize: values of `export.quantize`; ``int8`` selects a runtime's first one.
        bits: values of `export.bits`.
        linear: weights quantized in training that linear layers support.
        embedding: weights quantized in training that embeddings support.
        activations: quantization modes of the inputs of linear layers.
        float_fallback: whether linear layers with other inputs are stored in floats.
        needs_quantization: whether a student without quantized weights cannot be stored.
    """

    name: str
    packages: dict[str, str]
    runtime: str | None = None
    weight_files: str = "*"
    blocked: tuple[str, ...] = ("distill", "torch", "transformers")
    dtypes: tuple[str, ...] = DTYPES
    quantize: tuple[str, ...] = ("weights", "dynamic", "static")
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    linear: WeightSupport = WeightSupport()
    embedding: WeightSupport = WeightSupport()
    activations: tuple[str, ...] = ("dynamic", "static")
    float_fallback: bool = False
    needs_quantization: bool = False

    @property
    def label(self) -> str:
        """Its name in messages, such as ``onnxruntime (export.format=onnx)``."""
        key = f"export.format={self.name}"
        return f"{self.runtime} ({key})" if self.runtime else key

    @property
    def libraries(self) -> list[str]:
        """The packages that the exported program imports."""
        torch = [] if "torch" in self.blocked else ["torch"]
        return [str(self.runtime), *torch, "numpy", "tokenizers"]


_ANY_LINEAR = WeightSupport(methods=("linear",))
_INT8 = WeightSupport(methods=("linear",), bits=(8,))
_INT8_ROWS = WeightSupport(methods=("linear",), bits=(8,), affine=False, groups=False)
_ONNX_EXPORT = {"onnx": "1.18", "onnxscript": "0.5"}

FORMATS = {
    format.name: format
    for format in (
        Format("dense", packages={}),
        Format(
            "torchao",
            packages={"torchao": "0.18"},
            dtypes=("float32",),
            quantize=("weights", "dynamic"),
            bits=(8,),
            linear=_INT8,
            embedding=_INT8,
            activations=("dynamic",),
            needs_quantization=True,
        ),
        Format("packed", packages={}),
        Format(
            "lora",
            packages={"peft": "0.18"},
            quantize=(),
            bits=(8,),
        ),
        Format(
            "onnx",
            packages=_ONNX_EXPORT | {"onnxruntime": "1.20"},
            runtime="onnxruntime",
            weight_files="model.onnx*",
            dtypes=("float32",),
            quantize=("dynamic", "static", "weights"),
            bits=(8,),
            linear=_INT8_ROWS,
            embedding=_ANY_LINEAR,
        ),
        Format(
            "openvino",
            packages=_ONNX_EXPORT | {"openvino": "2025.0"},
            runtime="openvino",
            weight_files="openvino_model.*",
            dtypes=("float32", "bfloat16"),
            quantize=("static", "weights"),
            bits=(8,),
            linear=_INT8_ROWS,
            embedding=_ANY_LINEAR,
        ),
        Format(
            "executorch",
            packages={"executorch": "1.5", "torchao": "0.18"},
            runtime="executorch",
            weight_files="model.pte",
            blocked=("distill", "transformers"),  # the runtime itself imports torch
            dtypes=("float32",),
            quantize=("dynamic",),
            bits=(8,),
            linear=WeightSupport(methods=("linear",), affine=False, groups=False),
            embedding=_ANY_LINEAR,
            activations=("dynamic",),
            float_fallback=True,
        ),
    )
}
RUNTIMES = {name: format for name, format in FORMATS.items() if format.runtime}
