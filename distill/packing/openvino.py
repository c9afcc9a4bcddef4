"""A student -> `openvino_model.xml` and `.bin`: the graph of `onnx.py` in OpenVINO's own form, which needs no conversion to load."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.packing import onnx
from distill.tasks.base import Task

FILE = "openvino_model.xml"


def save(
    model: PreTrainedModel,
    task: Task,
    tokenizer: Any,
    target: Path,
    quantize: str | None,
    calibration: list[dict[str, Tensor]],
    dtype: str = "float32",
) -> bool:
    """Write the graph, and say what :func:`onnx.save` says.

    With `bfloat16`, in which the program then computes, weights are stored in half the bits: as float16.
    """
    import openvino

    with TemporaryDirectory() as temporary:
        by_steps = onnx.save(
            model, task, tokenizer, Path(temporary), quantize, calibration, format="openvino"
        )
        try:
            graph = openvino.convert_model(Path(temporary, onnx.FILE))
        except Exception as error:  # it has a class for each reason
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"export.format is openvino, but it cannot read the graph of a {type(model).__name__} ({reason}): set export.format=onnx"
            ) from error
        openvino.save_model(graph, target / FILE, compress_to_fp16=dtype != "float32")
    return by_steps
