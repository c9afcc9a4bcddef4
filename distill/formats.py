"""What an export's format can hold, as far as the recipe alone tells: refused before training, and before torch is imported."""

from importlib.util import find_spec
from typing import Any

from distill.errors import UserError

QUANTIZER = "Quantize"
OTHERS = "set export.format=packed or dense"


def check(callbacks: dict[str, Any], format: str | None, dtype: str, quantize: str | None, bits: int) -> None:
    """UserError where the techniques of a recipe leave something that its export cannot store.

    `dtype`, `quantize` and `bits` are those of the recipe's `export` section: what is quantized only after training.
    """
    trained = {name: spec for name, spec in callbacks.items() if str(spec.get("_target_")).rpartition(".")[2] == QUANTIZER}
    if quantize is None and bits != 8:
        raise UserError(f"export.bits is {bits}, but nothing is quantized after training: set export.quantize too, or leave bits out")
    if quantize is not None and trained:
        raise UserError(f"export.quantize is {quantize}, but callbacks.{next(iter(trained))} quantizes in training: leave one of them out")
    if format != "torchao":
        return
    if find_spec("torchao") is None:
        raise _refused("the package torchao is not installed", "pip install 'distill[torchao]', or choose export.format=packed")
    if dtype != "float32":
        raise _refused(f"export.dtype is {dtype}, in which its tensors do not compute", "leave export.dtype at float32")
    if not trained and quantize is None:
        raise _refused("nothing is quantized", "add a callback distill.callbacks.Quantize, or set export.quantize=weights")
    if quantize is not None:
        _check_int8("export.quantize", "export.bits", bits, "linear", quantize)
    for name, spec in trained.items():
        where = f"callbacks.{name}"
        _check_int8(f"{where}.activations", f"{where}.bits", spec.get("bits", 8), spec.get("method", "linear"), spec.get("activations"))


def _check_int8(inputs_key: str, bits_key: str, bits: int, method: str, inputs: str | None) -> None:
    if method != "linear":
        raise _refused(f"the weights are quantized with {method}, and torchao knows linear codes only", OTHERS)
    if bits != 8:
        raise _refused(f"{bits_key} is {bits}, and torchao stores a {bits}-bit value in a whole byte", OTHERS)
    if inputs == "static":
        raise _refused(f"{inputs_key} is static, and torchao rounds inputs to the range of each token only", f"{OTHERS}, or dynamic")


def _refused(reason: str, way_out: str) -> UserError:
    return UserError(f"export.format is torchao, but {reason}: {way_out}")
