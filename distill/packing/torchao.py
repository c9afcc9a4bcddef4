"""Weights -> int8 tensors of torchao, which transformers loads where torchao is installed.

The tensors store the integers and scales of training, so that they equal the trained values bit for
bit. Embeddings are quantized too: they are half of a small model.

O = output features, or rows of an embedding; I = input features.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import models
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import UserError
from distill.packing.packed import unique_tensors
from distill.recipe import capabilities
from distill.remote_code.modeling import CompressionConfig

FORMAT = "torchao"
# The quantizer's integers begin at 0, torchao's at -127 (symmetric) and -128 (affine).
SYMMETRIC, AFFINE = 127, 128
PER_TOKEN = "int8_asym_per_token"  # the value of torchao's enum, as a string, which can be saved
OTHER_FORMATS = "choose export.format=packed or dense"


def save(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Write the folder; each tensor records whether the inputs of its layer are quantized.

    Args:
        model: changed in place.
        tokenizer: saved with it.
        target: an empty folder.
        dtype: float type of weights that are not quantized, and of computation.

    Raises:
        UserError: if torchao cannot store a weight.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    compression = CompressionConfig.from_config(model.config)
    check(model, compression)
    tensors = {
        name: int8_tensor(
            model.get_parameter(name).detach(),
            QuantSpec(**fields),
            name.removesuffix(".weight") in compression.activations,
            dtype,
        )
        for name, fields in compression.weights.items()
    }
    model.to(dtype)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(tensor, requires_grad=False)
    structure = CompressionConfig(shapes=compression.shapes, low_rank=compression.low_rank)
    structure.write_to(model.config)
    # transformers reads it only to detect tensors of torchao.
    config = TorchAoConfig(_torchao_config(bool(compression.activations)))
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    models.save(model, tokenizer, target)


def _torchao_config(quantized_inputs: bool) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    if quantized_inputs:
        return Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    return IntxWeightOnlyConfig(torch.int8, PerAxis(0))


def int8_tensor(
    weight_OI: Tensor, spec: QuantSpec, quantized_inputs: bool, dtype: torch.dtype
) -> Tensor:
    """(qweight - zero point) * scale, as torchao computes it."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    qweight_OI, parts = quantize_weight(weight_OI, spec)
    (rows, columns), groups = weight_OI.shape, len(parts["scale"])
    blocks = (1, 1) if groups == 1 else (rows, groups // rows)
    zero = parts["zero"].short() - AFFINE if "zero" in parts else torch.zeros(groups)
    return IntxUnpackedToInt8Tensor(
        (qweight_OI.short() - (SYMMETRIC if spec.symmetric else AFFINE)).to(torch.int8),
        parts["scale"].to(dtype).view(blocks),
        zero.to(torch.int8).view(blocks),
        torch.int8,
        (rows // blocks[0], columns // blocks[1]),
        dtype,
        PER_TOKEN if quantized_inputs else None,
    )


def check(model: PreTrainedModel, compression: CompressionConfig) -> None:
    """Raise UserError if torchao cannot store the compressed student."""
    check_layers(model, compression.weights)
    if not compression.weights:
        raise _unsupported(
            "no weight of the student is quantized",
            "train with a quantizer, or set export.quantize=weights",
        )
    for name, fields in compression.weights.items():
        capabilities.check_tensor(FORMAT, None, name, QuantSpec(**fields))
    for name, ends in compression.activations.items():
        if ends is not None:
            raise _unsupported(
                f"the inputs of {name} are quantized to a fixed range, and torchao supports the "
                "range of each token only",
                OTHER_FORMATS,
            )
        if f"{name}.weight" not in compression.weights:
            raise _unsupported(
                f"the inputs of {name} are quantized, but its weights are not", OTHER_FORMATS
            )


def check_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise UserError if torchao cannot store these weights, however they are quantized."""
    tied = [aliases for aliases, _ in unique_tensors(model.state_dict()) if len(aliases) > 1]
    for name in names:
        if any(name in aliases for aliases in tied):
            raise _unsupported(
                f"{name} is a tied tensor, which transformers cannot load from torchao's tensors",
                OTHER_FORMATS,
            )
        if isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D):
            raise _unsupported(
                f"{name} belongs to a transposed linear layer of GPT-2, which torchao does not "
                "support",
                OTHER_FORMATS,
            )


def _unsupported(reason: str, way_out: str) -> UserError:
    return UserError(f"export.format is {FORMAT}, but {reason}: {way_out}")
