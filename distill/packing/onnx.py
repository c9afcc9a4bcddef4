"""A student -> `model.onnx`: any batch, any length, the student's weights or its int8 codes."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.packing import kv_cache, layer_norm, post_training, quant_layers
from distill.packing.runtime_folder import LogitsModule, input_names
from distill.remote_code.modeling import compression_of
from distill.tasks.base import Task

FILE = "model.onnx"
OPSET = 20
FREE = torch.export.Dim.DYNAMIC
LENGTH, BEFORE = 7, 3  # of the examples: their new tokens, and those before them
CHATTY = ("torch.onnx", "onnxscript", "onnx_ir")  # loggers of the exporter

log = logging.getLogger("distill")


def save(
    model: PreTrainedModel,
    task: Task,
    tokenizer: Any,
    target: Path,
    quantize: str | None,
    calibration: list[dict[str, Tensor]],
    format: str = "onnx",
) -> bool:
    """Write the graph, and say whether it takes keys and values of what was read before, as a language model's does where it can.

    What was quantized in training, or is now, computes with its codes: see :func:`integers`.
    """
    model.eval()
    model.set_attn_implementation("eager")
    kept = kv_cache.cache_entries(model) if task.pipeline == "text-generation" else []
    integers(model, quantize, calibration, format)
    if format == "onnx":
        layer_norm.decompose_layer_norms(model)
    program, by_steps = written(model, input_names(model, tokenizer), kept, format)
    _forget(program.model)
    program.save(str(target / FILE))
    return by_steps


def integers(
    model: PreTrainedModel, quantize: str | None, calibration: list[dict[str, Tensor]], format: str
) -> None:
    """Layers of codes for the weights that lie on a grid: their trained one, or else 8 bits for each row, which `quantize` asks for.

    Inputs of linear layers are rounded as they were in training, or as `quantize` says: `dynamic`, `static`, `weights` (not at all).
    A trained range is kept, others come from the calibration.
    """
    if quantize is not None and not compression_of(model.config).get("weights"):
        post_training.quantize_model(model, "weights", 8, ())
    compression = compression_of(model.config)
    weights, trained = compression.get("weights", {}), compression.get("activations", {})
    layers = quant_layers.linear_layers(model, weights)
    ranges = {name: said["range"] for name, said in trained.items() if said["range"] is not None}
    inputs: dict[str, Any] = {}
    if quantize == "static":
        found = post_training.observe_ranges(
            model,
            {name: layer for name, layer in layers.items() if name not in ranges},
            calibration,
        )
        inputs = {
            name: quant_layers.input_quantization(None, span, trained=False)
            for name, span in found.items()
        }
    if quantize == "dynamic":
        inputs = {
            name: quant_layers.input_quantization("dynamic", None, trained=False) for name in layers
        }
    if quantize is None:
        inputs = {
            name: quant_layers.input_quantization("token", None, trained=True) for name in trained
        }
    if quantize in (None, "static"):
        inputs |= {
            name: quant_layers.input_quantization(None, span, trained=True)
            for name, span in ranges.items()
        }
    quant_layers.replace_layers(model, weights, inputs, format)


class Sketch(NamedTuple):
    """What a graph is traced from: a module, and for each of its inputs an example with its free dimensions."""

    module: nn.Module
    inputs: dict[str, tuple[Tensor, dict[int, Any]]]
    outputs: list[str]


def at_once(model: PreTrainedModel, names: list[str]) -> Sketch:
    """Whole texts: two of which one is padded, so that nothing of them is taken for fixed."""
    example = {name: torch.ones(2, LENGTH, dtype=torch.long) for name in names}
    example["attention_mask"][1, LENGTH - 2 :] = 0
    if "token_type_ids" in example:
        example["token_type_ids"] *= 0
    return Sketch(
        LogitsModule(model, names),
        {name: (tensor, {0: FREE, 1: FREE}) for name, tensor in example.items()},
        ["logits"],
    )


def by_steps(model: PreTrainedModel, states: list[kv_cache.CacheEntry]) -> Sketch:
    """New tokens after some that were read before, or none."""
    mask = torch.ones(2, BEFORE + LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    inputs = {"input_ids": torch.ones(2, LENGTH, dtype=torch.long), "attention_mask": mask}
    given = {name: (tensor, {0: FREE, 1: FREE}) for name, tensor in inputs.items()}
    kept = {
        f"{kv_cache.PAST}.{state.name}": (state.of(2, BEFORE), {0: FREE, 2: FREE})
        for state in states
    }
    return Sketch(
        kv_cache.CachedForward(model),
        given | kept,
        ["logits", *(f"{kv_cache.PRESENT}.{state.name}" for state in states)],
    )


def written(
    model: PreTrainedModel, names: list[str], kept: list[kv_cache.CacheEntry], format: str
) -> tuple[Any, bool]:
    """The graph by steps, which holds the weights once for texts and for each token that follows; else that of whole texts."""
    if kept:
        try:
            return traced(by_steps(model, kept), model, format), True
        except UserError as error:
            log.info("its keys and values are not cached: %s", error)
    return traced(at_once(model, names), model, format), False


def traced(sketch: Sketch, model: PreTrainedModel, format: str) -> Any:
    """The graph."""
    examples, free = zip(*sketch.inputs.values(), strict=True)
    with quiet(), torch.no_grad():
        try:
            return torch.onnx.export(
                sketch.module,
                examples,
                input_names=list(sketch.inputs),
                output_names=sketch.outputs,
                dynamic_shapes=(free,),
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
