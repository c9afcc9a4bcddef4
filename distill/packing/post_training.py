"""Quantization after training: weights at once, and the ranges of layers' inputs from training examples. No training repairs it."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import data, models
from distill.compress.quantizer import (
    MIN_EMBEDDING_ROWS,
    QuantSpec,
    default_group_size,
    fake_quantize_weight,
)
from distill.recipe import config
from distill.remote_code.modeling import LINEAR, compression_of, in_out_features, quantize_input
from distill.tasks.base import Task

CALIBRATION = 128  # training examples that decide the ranges of inputs


def quantize_model(
    student: PreTrainedModel, how: str, bits: int, examples: Iterable[dict[str, Tensor]]
) -> None:
    """The matrices of the student on linear grids; with `dynamic` or `static` the inputs of linear layers on 8-bit ones too.

    The grids are those of distill.callbacks.Quantize: 8 bits are symmetric, a grid for each output row; fewer are affine, one for
    each group of neighbours.
    """
    layers = default_layers(student)
    record = dict(compression_of(student.config))
    sparse = record.get("sparse", [])
    record["weights"] = {
        f"{name}.weight": _on_grid(layer, bits, f"{name}.weight" in sparse)
        for name, layer in layers.items()
    }
    if how != "weights":
        linear: dict[str, nn.Module] = {
            name: layer for name, layer in layers.items() if isinstance(layer, LINEAR)
        }
        found = (
            observe_ranges(student, linear, examples) if how == "static" else dict.fromkeys(linear)
        )
        record["activations"] = {
            name: {"bits": 8, "range": found[name]} for name in linear if name in found
        }
        for name, rounded in record["activations"].items():
            quantize_input(linear[name], rounded["range"])
    student.config.compression = record


def default_layers(student: PreTrainedModel) -> dict[str, nn.Module]:
    """Embeddings, and linear layers but for a head that narrows (a classifier) or shares its weight with the embeddings."""
    inside = {id(module) for block in models.blocks(student) for module in block.modules()}
    table = student.get_input_embeddings().weight

    def counts(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Embedding):
            return layer.num_embeddings >= MIN_EMBEDDING_ROWS
        if not isinstance(layer, LINEAR) or layer.weight is table:
            return False
        into, out = in_out_features(layer)
        return id(layer) in inside or out >= into

    return {name: layer for name, layer in student.named_modules() if counts(layer)}


@torch.no_grad()
def _on_grid(layer: nn.Module, bits: int, sparse: bool) -> dict[str, Any]:
    """Move the layer's weight; returns how."""
    weight = layer.get_parameter("weight")
    weight_OI = weight.T if isinstance(layer, Conv1D) else weight
    spec = QuantSpec(
        bits=bits, symmetric=bits == 8, group=default_group_size(bits, weight_OI.shape[1])
    )
    weight_OI.copy_(fake_quantize_weight(weight_OI, spec, sparse))
    return spec.as_dict()


@torch.inference_mode()
def observe_ranges(
    student: PreTrainedModel, layers: dict[str, nn.Module], examples: Iterable[dict[str, Tensor]]
) -> dict[str, list[float]]:
    """[lowest, highest] input of each layer over the examples; layers that none of them reaches are left out."""
    found: dict[str, list[float]] = {}

    def hook(name: str) -> Any:
        def widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = (float(each) for each in inputs[0].aminmax())
            earlier = found.get(name, [low, high])
            found[name] = [min(low, earlier[0]), max(high, earlier[1])]

        return widen

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for inputs in examples:
        models.logits(student, inputs)
    for handle in handles:
        handle.remove()
    return found


def calibration_inputs(run: config.Run, task: Task, tokenizer: Any) -> Iterable[dict[str, Tensor]]:
    """Inputs of training examples spread over the split, one at a time: so that no padding counts."""
    raw = data.load(run.data, task, run.seed)["train"]
    count = min(CALIBRATION, len(raw))
    default_layers = raw.select([place * len(raw) // count for place in range(count)])
    encoded = data.encode(DatasetDict({"train": default_layers}), task, tokenizer, run.data)[
        "train"
    ]
    return (task.collate([example], tokenizer.pad_token_id).inputs for example in encoded)
