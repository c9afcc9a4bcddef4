"""A student -> `model.onnx`: any batch, any length, the student's weights or its int8 codes."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import models
from distill.errors import UserError
from distill.packing import after, coded, norms
from distill.packing.served import inputs_of
from distill.runtime.modeling import recorded
from distill.tasks.base import Task

FILE = "model.onnx"
OPSET = 20
CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")  # loggers of the exporter


def save(
    model: PreTrainedModel,
    task: Task,
    tokenizer: Any,
    target: Path,
    quantize: str | None,
    calibration: list[dict[str, Tensor]],
    format: str = "onnx",
) -> None:
    """Write the graph. What was quantized in training, or is now, computes with its codes: see :func:`integers`."""
    model.eval()
    integers(model, quantize, calibration, format)
    if format == "onnx":
        norms.spell(model)
    program = traced(model, inputs_of(model, tokenizer), format)
    _forget(program.model)
    program.save(str(target / FILE))


def integers(model: PreTrainedModel, quantize: str | None, calibration: list[dict[str, Tensor]], format: str) -> None:
    """Layers of codes for the weights that lie on a grid: their trained one, or else 8 bits for each row, which `quantize` asks for.

    Inputs of linear layers are rounded as they were in training, or as `quantize` says: `dynamic`, `static`, `weights` (not at all).
    A trained range is kept, others come from the calibration.
    """
    if quantize is not None and not recorded(model.config).get("weights"):
        after.quantize_now(model, "weights", 8, ())
    compression = recorded(model.config)
    weights, trained = compression.get("weights", {}), compression.get("activations", {})
    layers = coded.linear_layers(model, weights)
    ranges = {name: said["range"] for name, said in trained.items() if said["range"] is not None}
    inputs: dict[str, Any] = {}
    if quantize == "static":
        found = after.ranges(model, {name: layer for name, layer in layers.items() if name not in ranges}, calibration)
        inputs = {name: coded.rounding(None, span, trained=False) for name, span in found.items()}
    if quantize == "dynamic":
        inputs = {name: coded.rounding("dynamic", None, trained=False) for name in layers}
    if quantize is None:
        inputs = {name: coded.rounding("token", None, trained=True) for name in trained}
    if quantize in (None, "static"):
        inputs |= {name: coded.rounding(None, span, trained=True) for name, span in ranges.items()}
    coded.replace(model, weights, inputs, format)


class Answers(nn.Module):
    """Named inputs -> logits, as a graph has them."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return models.logits(self.model, dict(zip(self.names, inputs, strict=True)))


def traced(model: PreTrainedModel, names: list[str], format: str) -> Any:
    """The graph, by way of two texts of which one is padded: so that nothing of them is taken for fixed."""
    model.set_attn_implementation("eager")
    length = 7
    example = {name: torch.ones(2, length, dtype=torch.long) for name in names}
    example["attention_mask"][1, length - 2 :] = 0
    if "token_type_ids" in example:
        example["token_type_ids"] *= 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet(), torch.no_grad():
        try:
            return torch.onnx.export(
                Answers(model, names),
                tuple(example[name] for name in names),
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple(free for _ in names),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"export.format is {format}, but the student is a {type(model).__name__}, which torch cannot write as a graph ({reason}): "
                "set export.format=dense or packed"
            ) from error


def _forget(graph: Any) -> None:
    """Drop where each node comes from: lines of code on this machine, which would be a third of a small file."""
    for node in graph.graph.all_nodes():
        for noted in (node, *node.outputs):
            noted.metadata_props.clear()
    graph.metadata_props.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notes on its own code are for its authors."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
