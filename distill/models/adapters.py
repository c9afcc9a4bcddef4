"""LoRA adapters of peft: attached to a student's linear layers, switched off, merged into them.

The student stays the same object: peft replaces the layers in place.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.models.families import blocks, linear_layers
from distill.models.forward import replace_forward
from distill.models.frozen_weights import (
    check_torchao,
    dequantize,
    dequantized,
    fits_nf4,
    quantize_nf4,
    store_in_bfloat16,
)
from distill.models.layer_selection import group_names
from distill.models.stored_tensors import is_in_head
from distill.recipe import config

ADAPTER = "default"  # peft's name of the only adapter
FOLDER = "adapter"  # beside the folder of the student


class BaseTeacher(nn.Module):
    """Stands for the student without its adapter, as its own teacher. It has no weights."""


def check_installed(lora: config.Lora | None) -> None:
    """UserError if a package that the recipe's section `student.lora` needs is missing."""
    if lora is None:
        return
    if find_spec("peft") is None:
        raise UserError(
            f"student.lora.rank is {lora.rank}, but peft is not installed: "
            "pip install 'distill[lora]'"
        )
    if lora.quantize is not None:
        check_torchao("student.lora.quantize", lora.quantize)


def attach(
    student: PreTrainedModel,
    lora: config.Lora,
    low_precision: bool = False,
    is_teacher: bool = False,
) -> None:
    """Freeze a student and put an adapter beside its linear layers.

    The head of a classifier, which is outside the blocks, is trained in full.

    Args:
        student: Changed in place.
        lora: The recipe's section `student.lora`.
        low_precision: Whether it trains under autocast to bfloat16.
        is_teacher: Whether it is its own teacher without the adapter, so that its head is frozen.

    Raises:
        UserError: `targets` match no linear layer, or none can be stored in 4 bits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(student, lora)
    if lora.quantize and not any(fits_nf4(student.get_submodule(name)) for name in targets):
        raise UserError(
            f"student.lora.quantize is {lora.quantize}, but {type(student).__name__} has no linear "
            "layer that can be stored in 4 bits: leave it out"
        )
    frozen = is_teacher or student.get_output_embeddings() is not None
    named = [] if frozen else student.named_parameters()
    head = [parameter for name, parameter in named if is_in_head(name, student)]
    transposed = any(isinstance(student.get_submodule(name), Conv1D) for name in targets)
    with warnings.catch_warnings():
        # peft warns if only some of the layers are transposed, and corrects it for each.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha or 2 * lora.rank,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=_short_names(student, targets),
                fan_in_fan_out=transposed,
            ),
            student,
        )
    for parameter in head:
        parameter.requires_grad = True
    for layer in _layers(student).values():
        base = layer.get_base_layer()
        if lora.quantize is not None:
            quantize_nf4(base)
        elif low_precision:
            store_in_bfloat16(base)
    student.base_fingerprint = _fingerprint(student)  # type: ignore[assignment]


def _targets(student: PreTrainedModel, lora: config.Lora) -> list[str]:
    """The names of the layers that get an adapter."""
    names = [name for name, _ in linear_layers(student)]
    if lora.targets is None:
        in_blocks = {id(module) for block in blocks(student) for module in block.modules()}
        return [name for name in names if id(student.get_submodule(name)) in in_blocks]
    head = student.get_output_embeddings()
    names = [name for name in names if student.get_submodule(name) is not head]
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"student.lora.targets has {pattern}, but no linear layer of the student matches: "
                f"name some of {', '.join(group_names(names))}, or leave it out"
            )
    return [name for name in names if any(fnmatchcase(name, each) for each in lora.targets)]


def _short_names(student: PreTrainedModel, targets: list[str]) -> list[str]:
    """The last parts of the names where they select the same layers, as other tools expect."""
    short = {name.rpartition(".")[2] for name in targets}
    selected = [name for name, _ in student.named_modules() if name.rpartition(".")[2] in short]
    return sorted(short) if selected == targets else targets


def _layers(student: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; empty if the student has none."""
    if not has_adapter(student):
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)
    }


def has_adapter(student: nn.Module) -> bool:
    """Whether there is an adapter beside the student's layers."""
    return hasattr(student, "peft_config")


@contextmanager
def without_adapter(student: nn.Module) -> Iterator[None]:
    """Inside the context, the student computes what it did before training."""
    with ExitStack() as stack:
        for layer in _layers(student).values():
            stack.enter_context(replace_forward(layer, layer.get_base_layer().forward))
        yield


@torch.no_grad()
def merge(student: PreTrainedModel) -> None:
    """Add the adapter to the weights, which get a gradient again; the layers are plain again."""
    for name, layer in _layers(student).items():
        base = layer.get_base_layer()
        dequantize(base)
        base.weight += layer.get_delta_weight(ADAPTER).to(base.weight.dtype)
        student.set_submodule(name, base)
    if has_adapter(student):
        del student.peft_config, student.base_fingerprint
        student.requires_grad_(True)


def save_adapter(student: PreTrainedModel, base: str | None, folder: Path) -> None:
    """Write an adapter as peft stores it.

    Args:
        student: A student with an adapter, and no other trained weights.
        base: Name of the model that it was attached to.
        folder: Written, with `adapter_config.json` and `adapter_model.safetensors`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings: Any = student.peft_config[ADAPTER]
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.task_type = "CAUSAL_LM" if student.can_generate() else None
    settings.save_pretrained(folder)
    tensors = get_peft_model_state_dict(student, adapter_name=ADAPTER)
    stored = {
        f"base_model.model.{name}": each.float().cpu().contiguous()
        for name, each in tensors.items()
    }
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})


# ---- checkpoints, which hold only what is trained


def base_state(student: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of a student with an adapter; none of any other student's."""
    if not _layers(student):
        return {}
    trained = {name for name, each in student.named_parameters() if each.requires_grad}
    tensors = student.state_dict()
    return {name: each for name, each in tensors.items() if name not in trained}


def _fingerprint(student: PreTrainedModel) -> str:
    """SHA-256 of the frozen weights; empty for a student without memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(student).items()):
        if tensor.is_meta:
            return ""
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = dequantized(tensor).detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_fingerprint(student: nn.Module) -> str:
    """SHA-256 of the frozen weights of a student with an adapter; empty for any other student."""
    return getattr(student, "base_fingerprint", "")
