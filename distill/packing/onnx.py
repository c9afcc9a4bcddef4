"""A student -> `model.onnx`, for any batch size and length, with float or int8 weights."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.packing import kv_cache, layer_norm, post_training, quant_layers
from distill.packing.graph import GraphOptions, LogitsModule
from distill.remote_code.modeling import CompressionConfig

FILE = "model.onnx"
OPSET = 20
DYNAMIC = torch.export.Dim.DYNAMIC
LENGTH, PAST_LENGTH = 7, 3  # tokens of the example inputs: new and cached
EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")

log = logging.getLogger("distill")


def save(model: PreTrainedModel, options: GraphOptions, target: Path, format: str = "onnx") -> bool:
    """Write the graph.

    Args:
        model: changed in place.
        options: quantized weights become int8 layers; see :func:`quantize_layers`.
        target: the folder of the file.
        format: format that the graph is for: ``onnx`` or ``openvino``.

    Returns:
        Whether keys and values of earlier tokens are inputs and outputs of the graph.
    """
    model.eval()
    model.set_attn_implementation("eager")
    entries = kv_cache.cache_entries(model) if options.cache else []
    quantize_layers(model, options, format)
    if format == "onnx":
        layer_norm.decompose_layer_norms(model)
    program, cached = export_graph(model, options.inputs, entries, format)
    _strip_metadata(program.model)
    program.save(str(target / FILE))
    return cached


def quantize_layers(model: PreTrainedModel, options: GraphOptions, format: str) -> None:
    """Replace layers with quantized weights by layers that compute with int8 weights.

    Weights keep the quantization of training; without one, `options.quantize` gives them 8 bits
    with a scale per row. Inputs of linear layers are quantized as in training or by
    `options.quantize`; ranges of training are kept, others are calibrated.
    """
    if options.quantize is not None and not CompressionConfig.from_config(model.config).weights:
        post_training.quantize_model(model, "weights", 8, ())
    compression = CompressionConfig.from_config(model.config)
    layers = quant_layers.linear_layers(model, compression.weights)
    inputs = _input_quantization(model, layers, compression.activations, options)
    quant_layers.replace_layers(model, compression.weights, inputs, format)


def _input_quantization(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    trained: dict[str, list[float] | None],
    options: GraphOptions,
) -> dict[str, quant_layers.InputQuantization]:
    """How the inputs of each linear layer are quantized, by the layer's name."""
    ranges = {name: ends for name, ends in trained.items() if ends is not None}
    fixed = {name: quant_layers.trained_range(*ends) for name, ends in ranges.items()}
    if options.quantize == "weights":
        return {}
    if options.quantize == "dynamic":
        return dict.fromkeys(layers, quant_layers.InputQuantization("dynamic"))
    if options.quantize == "static":
        others = {name: layer for name, layer in layers.items() if name not in ranges}
        observed = post_training.observe_ranges(model, others, options.calibration)
        calibrated = {name: quant_layers.symmetric_range(*ends) for name, ends in observed.items()}
        return calibrated | fixed
    return dict.fromkeys(trained, quant_layers.InputQuantization("token")) | fixed


class GraphInputs(NamedTuple):
    """A module to trace; for each of its inputs, an example and the dynamic dimensions."""

    module: nn.Module
    inputs: dict[str, tuple[Tensor, dict[int, Any]]]
    outputs: list[str]


def text_inputs(model: PreTrainedModel, names: list[str]) -> GraphInputs:
    """Two complete texts, one padded, so that no dimension is traced as a constant."""
    example = {name: torch.ones(2, LENGTH, dtype=torch.long) for name in names}
    example["attention_mask"][1, LENGTH - 2 :] = 0
    if "token_type_ids" in example:
        example["token_type_ids"] *= 0
    return GraphInputs(
        LogitsModule(model, names),
        {name: (tensor, {0: DYNAMIC, 1: DYNAMIC}) for name, tensor in example.items()},
        ["logits"],
    )


def cached_inputs(model: PreTrainedModel, entries: Sequence[kv_cache.CacheEntry]) -> GraphInputs:
    """New tokens after cached ones, of which there may be none."""
    mask = torch.ones(2, PAST_LENGTH + LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    tokens = {"input_ids": torch.ones(2, LENGTH, dtype=torch.long), "attention_mask": mask}
    inputs = {name: (tensor, {0: DYNAMIC, 1: DYNAMIC}) for name, tensor in tokens.items()}
    past = {
        f"{kv_cache.PAST}.{entry.name}": (entry.zeros(2, PAST_LENGTH), {0: DYNAMIC, 2: DYNAMIC})
        for entry in entries
    }
    outputs = ["logits", *(f"{kv_cache.PRESENT}.{entry.name}" for entry in entries)]
    return GraphInputs(kv_cache.CachedForward(model), inputs | past, outputs)


def export_graph(
    model: PreTrainedModel, names: list[str], entries: list[kv_cache.CacheEntry], format: str
) -> tuple[Any, bool]:
    """The graph with cached keys and values if it can be traced, else the one without.

    With a cache, it serves complete texts and single new tokens alike.
    """
    if entries:
        try:
            return trace(cached_inputs(model, entries), model, format), True
        except UserError as error:
            log.info("keys and values are not cached: %s", error)
    return trace(text_inputs(model, names), model, format), False


def trace(graph: GraphInputs, model: PreTrainedModel, format: str) -> Any:
    """The program of torch.onnx; UserError if torch cannot export the model."""
    examples, dynamic_shapes = zip(*graph.inputs.values(), strict=True)
    with _silence_exporter(), torch.no_grad():
        try:
            return torch.onnx.export(
                graph.module,
                examples,
                input_names=list(graph.inputs),
                output_names=graph.outputs,
                dynamic_shapes=(dynamic_shapes,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"export.format is {format}, but the student is a {type(model).__name__}, "
                f"which torch cannot write as a graph ({reason}): "
                "set export.format=dense or packed"
            ) from error


def _strip_metadata(graph: Any) -> None:
    """Drop source locations of nodes: a third of a small file, with paths of this machine."""
    for node in graph.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    graph.metadata_props.clear()


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide the exporter's warnings about its implementation."""
    loggers = [logging.getLogger(name) for name in EXPORTER_LOGGERS]
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
