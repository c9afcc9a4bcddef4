"""A student -> `model.pte`, a program of ExecuTorch whose matrices XNNPACK multiplies: float32, or int8 on int8.

Codes and scales are those that were trained, where they were; every other matrix is put on the symmetric 8-bit grid of its rows. An
embedding stays codes: its rows are looked up first and made float afterwards. What GPT-2 stores transposed becomes a linear layer.

O = output features, or rows of an embedding; I = input features.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import RunFailed, UserError
from distill.packing.post_training import default_layers
from distill.packing.runtime_folder import LogitsModule, input_names
from distill.packing.torchao import PER_TOKEN
from distill.remote_code.modeling import ActivationQuantConv1D, compression_of, quantize_input
from distill.tasks.base import Task

FILE = "model.pte"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # as far as the model knows them
BATCH = 32  # texts that the program takes at once, unless their logits would need more than LARGEST bytes: its memory is planned
LARGEST = 256 << 20
ROWS = QuantSpec()  # the grid of what was not trained on one


def save(
    model: PreTrainedModel,
    task: Task,
    tokenizer: Any,
    target: Path,
    quantize: str | None,
    calibration: list[dict[str, Tensor]],
) -> bool:
    """Write the program. False: keys and values are neither inputs nor outputs.

    `quantize`: int8 weights, and inputs of linear layers rounded to each token's own range. What was quantized in training, weights or
    inputs, is so in any case. The program takes INPUTS by their place.
    """
    model.eval().requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            turned = _linear(layer.weight.T.contiguous(), layer.bias)
            model.set_submodule(name, turned)
            if isinstance(layer, ActivationQuantConv1D):
                quantize_input(turned, layer.input_range)
    quantize_layers(model, quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated uses inside the libraries
        _lowered(model, task, tokenizer).save(str(target / FILE))
    return False


def _linear(weight_OI: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight_OI, requires_grad=False), bias  # type: ignore[assignment]
    return made


def quantize_layers(model: PreTrainedModel, quantize: str | None) -> None:
    """Integers in the place of the matrices on a trained grid; where something is to be quantized, of all that :func:`chosen` names.

    XNNPACK multiplies integers by integers: a layer whose inputs are not rounded, or to a fixed range, stays float where it may.
    """
    compression = compression_of(model.config)
    trained, rounded = compression.get("weights", {}), compression.get("activations", {})
    dynamic = {name for name, how in rounded.items() if how["range"] is None}
    coded = {name.removesuffix(".weight") for name in trained}
    if quantize is not None:
        if len(dynamic) < len(rounded):
            raise _refused(
                f"the inputs of {min({*rounded} - dynamic)} are rounded to a fixed range, and XNNPACK finds each token's own"
            )
        table = model.get_input_embeddings().weight
        tied = {
            name for name, layer in model.named_modules() if getattr(layer, "weight", None) is table
        }
        coded = dynamic = coded | tied | {*default_layers(model)}
    for name in sorted(coded):
        layer, spec = (
            model.get_submodule(name),
            QuantSpec(**trained.get(f"{name}.weight", ROWS.as_dict())),
        )
        if isinstance(layer, nn.Linear) and name in dynamic:
            model.set_submodule(name, _linear(int8(layer.weight, spec, name), layer.bias))
        elif type(layer) is nn.Embedding:  # others do more than look up
            model.set_submodule(name, QuantEmbedding(layer.weight, spec, name))


def check(name: str, spec: QuantSpec) -> None:
    """UserError where XNNPACK cannot multiply integers by codes of this grid."""
    if spec.method != "linear" or not spec.symmetric or spec.group > 0:
        raise _refused(
            f"{name} is quantized with {spec.as_dict()}, and XNNPACK multiplies by symmetric rows only"
        )


def int8(weight_OI: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """The weight of a linear layer as torchao's tensor of 8-bit integers, which ExecuTorch reads; fewer bits take as much."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    check(name, spec)
    (rows, columns), (codes_OI, parts) = weight_OI.shape, quantize_weight(weight_OI, spec)
    integers_OI, zero_O1 = (
        (codes_OI.short() - spec.levels // 2).to(torch.int8),
        torch.zeros(rows, 1, dtype=torch.int8),
    )
    return IntxUnpackedToInt8Tensor(
        integers_OI,
        by_row(parts["scale"], rows),
        zero_O1,
        torch.int8,
        (1, columns),
        torch.float32,
        PER_TOKEN,
    )


def by_row(grids_G: Tensor, rows: int) -> Tensor:
    """What belongs to each grid, as (rows, grids of a row); the only grid of a tensor belongs to every row."""
    return (
        (grids_G.expand(rows) if len(grids_G) == 1 else grids_G)
        .float()
        .reshape(rows, -1)
        .contiguous()
    )


class QuantEmbedding(nn.Module):
    """An embedding of integers, two in a byte where they have 4 bits or fewer: (integer - zero) * scale, after the look-up."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight_OI: Tensor, spec: QuantSpec, name: str) -> None:
        super().__init__()
        if spec.method != "linear":
            raise _refused(
                f"{name} is quantized with {spec.method}, and a look-up of ExecuTorch's makes linear codes float only"
            )
        codes_OI, parts = quantize_weight(weight_OI, spec)
        self.halves = spec.bits <= 4 and weight_OI.shape[1] % 2 == 0
        centred = spec.symmetric and not self.halves
        shift = 8 if self.halves else spec.levels // 2 if centred else 128
        zero_G = (
            parts.get("zero", torch.full_like(parts["scale"], spec.levels // 2)).float() - shift
        )
        stored = (
            codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]
            if self.halves
            else (codes_OI.short() - shift).to(torch.int8)
        )
        self.register_buffer("codes", stored)
        self.register_buffer("scale", by_row(parts["scale"], len(weight_OI)))
        self.register_buffer("zero", None if centred else by_row(zero_G, len(weight_OI)))

    def forward(self, input: Tensor) -> Tensor:
        known = torch.ops.quantized_decomposed
        look_up, low = (known.embedding_4bit, -8) if self.halves else (known.embedding_byte, -128)
        return look_up(self.codes, self.scale, self.zero, low, -low - 1, input)


def _lowered(model: PreTrainedModel, task: Task, tokenizer: Any) -> Any:
    """The program, of any number of texts and tokens up to what its memory is planned for; RunFailed where an operator is unknown."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  # makes the look-ups of codes known

    taken = input_names(model, tokenizer)
    names = [name for name in INPUTS if name in taken]
    width = task.max_length * model.config.vocab_size if task.pipeline == "text-generation" else 1
    most = max(2, min(BATCH, LARGEST // (4 * width)))
    sample = torch.ones(2, min(8, task.max_length), dtype=torch.long).tril(
        1
    )  # not all of it counts
    sizes = {
        0: torch.export.Dim("batch", min=1, max=most),
        1: torch.export.Dim("tokens", min=1, max=task.max_length),
    }
    try:
        exported = torch.export.export(
            LogitsModule(model, names),
            tuple(sample.clone() for _ in names),
            dynamic_shapes=((sizes,) * len(names),),
        )
        return to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ).to_executorch()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunFailed(
            f"export.format is executorch, but {type(model).__name__} cannot be lowered ({type(error).__name__}: {reason}): "
            "choose export.format=onnx or dense"
        ) from error


def _refused(reason: str) -> UserError:
    return UserError(f"export.format is executorch, but {reason}: choose export.format=packed")
