"""Quantization after training: weights at once, and the ranges of layers' inputs from training examples. No training repairs it."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import config, data, models
from distill.compress.quantize import TABLE, Spec, quantized, suited
from distill.runtime.modeling import LINEAR, recorded, round_input, widths
from distill.tasks.base import Task

CALIBRATION = 128  # training examples that decide the ranges of inputs


def quantize_now(student: PreTrainedModel, how: str, bits: int, examples: Iterable[dict[str, Tensor]]) -> None:
    """The matrices of the student on linear grids; with `dynamic` or `static` the inputs of linear layers on 8-bit ones too.

    The grids are those of distill.callbacks.Quantize: 8 bits are symmetric, a grid for each output row; fewer are affine, one for
    each group of neighbours.
    """
    layers = chosen(student)
    record = dict(recorded(student.config))
    sparse = record.get("sparse", [])
    record["weights"] = {f"{name}.weight": _on_grid(layer, bits, f"{name}.weight" in sparse) for name, layer in layers.items()}
    if how != "weights":
        linear: dict[str, nn.Module] = {name: layer for name, layer in layers.items() if isinstance(layer, LINEAR)}
        found = ranges(student, linear, examples) if how == "static" else dict.fromkeys(linear)
        record["activations"] = {name: {"bits": 8, "range": found[name]} for name in linear if name in found}
        for name, rounded in record["activations"].items():
            round_input(linear[name], rounded["range"])
    student.config.compression = record


def chosen(student: PreTrainedModel) -> dict[str, nn.Module]:
    """Embeddings, and linear layers but for a head that narrows (a classifier) or shares its weight with the embeddings."""
    inside = {id(module) for block in models.blocks(student) for module in block.modules()}
    table = student.get_input_embeddings().weight

    def counts(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Embedding):
            return layer.num_embeddings >= TABLE
        if not isinstance(layer, LINEAR) or layer.weight is table:
            return False
        into, out = widths(layer)
        return id(layer) in inside or out >= into

    return {name: layer for name, layer in student.named_modules() if counts(layer)}


@torch.no_grad()
def _on_grid(layer: nn.Module, bits: int, sparse: bool) -> dict[str, Any]:
    """Move the layer's weight; returns how."""
    weight = layer.get_parameter("weight")
    weight_OI = weight.T if isinstance(layer, Conv1D) else weight
    spec = Spec(bits=bits, symmetric=bits == 8, group=suited(bits, weight_OI.shape[1]))
    weight_OI.copy_(quantized(weight_OI, spec, sparse))
    return spec.as_dict()


@torch.inference_mode()
def ranges(student: PreTrainedModel, layers: dict[str, nn.Module], examples: Iterable[dict[str, Tensor]]) -> dict[str, list[float]]:
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


def calibration(run: config.Run, task: Task, tokenizer: Any) -> Iterable[dict[str, Tensor]]:
    """Inputs of training examples spread over the split, one at a time: so that no padding counts."""
    raw = data.load(run.data, task, run.seed)["train"]
    count = min(CALIBRATION, len(raw))
    chosen = raw.select([place * len(raw) // count for place in range(count)])
    encoded = data.encode(DatasetDict({"train": chosen}), task, tokenizer, run.data)["train"]
    return (task.collate([example], tokenizer.pad_token_id).inputs for example in encoded)
