"""A student -> `openvino_model.xml` and `.bin`: the graph of `onnx.py` in OpenVINO's format."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from distill.errors import UserError
from distill.packing import onnx
from distill.packing.graph import GraphOptions

FILE = "openvino_model.xml"


def save(model: PreTrainedModel, options: GraphOptions, target: Path) -> bool:
    """Write the graph; see :func:`distill.packing.onnx.save`.

    With ``bfloat16``, the program computes in bfloat16 and weights are stored as float16.
    """
    import openvino

    with TemporaryDirectory() as temporary:
        cached = onnx.save(model, options, Path(temporary), format="openvino")
        try:
            graph = openvino.convert_model(Path(temporary, onnx.FILE))
        except Exception as error:  # OpenVINO raises various classes
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                "export.format is openvino, but it cannot read the graph of a "
                f"{type(model).__name__} ({reason}): set export.format=onnx"
            ) from error
        openvino.save_model(graph, target / FILE, compress_to_fp16=options.dtype != "float32")
    return cached
