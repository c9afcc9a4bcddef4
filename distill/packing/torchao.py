"""Weights -> int8 tensors of torchao inside an ordinary folder: plain transformers loads it where torchao is installed.

The tensors are made of our own codes and scales, so that what they stand for is bit for bit what was trained. An embedding is one
of them too: it is half of a small model.
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
from distill.remote_code.modeling import compression_of

SYMMETRIC, AFFINE = 127, 128  # our codes begin at 0, torchao's at -127 and -128
PER_TOKEN = (
    "int8_asym_per_token"  # the value of torchao's enumeration, in the form that it can store
)
OTHERS = "choose export.format=packed or dense"


def save(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Quantized weights as int8 tensors, the others as `dtype`; whether inputs are rounded is said by the tensors themselves."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    compression = compression_of(model.config)
    activations = compression.get("activations", {})
    check(model, compression)
    made = {
        name: int8(
            model.get_parameter(name).detach(),
            spec,
            name.removesuffix(".weight") in activations,
            dtype,
        )
        for name, spec in compression["weights"].items()
    }
    model.to(dtype)  # type: ignore[arg-type]
    for name, tensor in made.items():
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(
            tensor, requires_grad=False
        )
    model.config.compression = {
        part: compression[part] for part in ("shapes", "low_rank") if compression.get(part)
    }
    kind = (
        Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
        if activations
        else IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    )
    model.config.quantization_config = TorchAoConfig(
        kind
    )  # read only to know that this is torchao's
    model.hf_quantizer = AutoHfQuantizer.from_config(
        model.config.quantization_config, pre_quantized=True
    )
    models.save(model, tokenizer, target)


def int8(weight_OI: Tensor, spec: dict[str, Any], rounds_input: bool, dtype: torch.dtype) -> Tensor:
    """(code - zero) * scale, as torchao computes it."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    codes_OI, parts = quantize_weight(weight_OI, QuantSpec(**spec))
    (rows, columns), groups = weight_OI.shape, len(parts["scale"])
    blocks = (1, 1) if groups == 1 else (rows, groups // rows)
    zero = parts["zero"].short() - AFFINE if "zero" in parts else torch.zeros(groups)
    return IntxUnpackedToInt8Tensor(
        (codes_OI.short() - (SYMMETRIC if spec["symmetric"] else AFFINE)).to(torch.int8),
        parts["scale"].to(dtype).view(blocks),
        zero.to(torch.int8).view(blocks),
        torch.int8,
        (rows // blocks[0], columns // blocks[1]),
        dtype,
        PER_TOKEN if rounds_input else None,
    )


def check(model: PreTrainedModel, compression: dict[str, Any]) -> None:
    """UserError where torchao has no tensor for what the student is."""
    weights = compression.get("weights", {})
    check_layers(model, weights)
    if not weights:
        raise _refused(
            "no weight of the student is quantized",
            "train with a quantizer, or set export.quantize=weights",
        )
    for name, spec in weights.items():
        if spec["method"] != "linear":
            raise _refused(
                f"{name} is quantized with {spec['method']}, and torchao knows linear codes only",
                OTHERS,
            )
        if spec["bits"] < 8:
            raise _refused(
                f"torchao stores a {spec['bits']}-bit value in a whole byte ({name})", OTHERS
            )
    for module, rounding in compression.get("activations", {}).items():
        if rounding["range"] is not None or rounding["bits"] != 8:
            raise _refused(
                f"the inputs of {module} are rounded to a fixed range, and torchao has only that of each token",
                OTHERS,
            )
        if f"{module}.weight" not in weights:
            raise _refused(f"the inputs of {module} are rounded, but its weights are not", OTHERS)


def check_layers(model: PreTrainedModel, tensors: Iterable[str]) -> None:
    """UserError where torchao has no tensor for the layers that these belong to, whatever their codes."""
    tied = [names for names, _ in unique_tensors(model.state_dict()) if len(names) > 1]
    for name in tensors:
        if any(name in names for names in tied):
            raise _refused(
                f"{name} is a tied tensor, which transformers cannot load in torchao's form", OTHERS
            )
        if isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D):
            raise _refused(
                f"{name} belongs to a layer of GPT-2's, which torchao cannot compute with", OTHERS
            )


def _refused(reason: str, way_out: str) -> UserError:
    return UserError(f"export.format is torchao, but {reason}: {way_out}")
