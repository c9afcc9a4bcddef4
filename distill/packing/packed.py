"""Weights -> `packed.safetensors` as `remote_code/container.py` reads it, and back to dense ones.

O = output features, I = input features, N = weights of a tensor.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import models
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import RunFailed, UserError
from distill.models.hub import silence_transformers, translate_errors
from distill.models.saving import write_auto_map
from distill.packing.file_header import sort_metadata
from distill.remote_code import container
from distill.remote_code.modeling import CompressionConfig

Parts = dict[str, Tensor]


def save(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Write the container, config, tokenizer and code.

    Args:
        model: computes in float32 when loaded, whatever `dtype` is.
        tokenizer: saved with it.
        target: an empty folder.
        dtype: float type of tensors that are not quantized.
    """
    compression = CompressionConfig.from_config(model.config)
    tensors, metadata = pack(model.state_dict(), compression, transposed(model), dtype)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    with silence_transformers():
        model.config.save_pretrained(target)
        if model.can_generate():
            model.generation_config.save_pretrained(target)
        models.save_tokenizer(tokenizer, target)
    write_auto_map(model, target, code=True)
    save_file(tensors, target / container.FILE, metadata)
    sort_metadata(target / container.FILE)
    (target / container.FILE).chmod((target / "config.json").stat().st_mode)


def transposed(model: torch.nn.Module) -> set[str]:
    """Names of the weights stored as (in, out), as GPT-2 does."""
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }


def pack(
    weights: dict[str, Tensor],
    compression: CompressionConfig,
    transposed: set[str],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Pack a state dict.

    Integers are computed from weights that are already fake-quantized, because the quantizer is
    idempotent. Tied weights are stored once. Tensors that are neither quantized nor sparse are
    stored in `dtype`.

    Returns:
        The tensors and the metadata of the container.

    Raises:
        RunFailed: if a tensor does not unpack to its weights.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for names, weight in unique_tensors(weights):
        name = names[0]
        spec = next(
            (compression.weights[alias] for alias in names if alias in compression.weights), None
        )
        sparse = any(alias in compression.sparse for alias in names)
        is_transposed = any(alias in transposed for alias in names)
        parts = pack_tensor(weight.T if is_transposed else weight, spec, sparse, dtype)
        if parts is None:
            stored = dtype if weight.is_floating_point() else weight.dtype
            tensors[name] = weight.to(stored).contiguous()
            continue
        smaller = deflated(parts)
        entries[name] = {
            "shape": list(weight.shape),
            "transposed": is_transposed,
            "spec": spec,
            "deflated": list(smaller),
        }
        unpacked = container.unpack_tensor(entries[name], parts | smaller)
        _check(name, weight if spec else weight.to(dtype), unpacked)
        tensors |= {f"{name}:{part}": tensor for part, tensor in (parts | smaller).items()}
    packed = json.dumps(entries)
    return tensors, {
        "format": "pt",
        "version": container.VERSION,
        "digest": container.digest(tensors, packed),
        "packed": packed,
    }


def unique_tensors(weights: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Each tensor once, with all its names; tied ones have several, and the first stores them."""
    unique: dict[tuple[int | str, torch.Size], tuple[list[str], Tensor]] = {}
    for name, weight in weights.items():
        key = (weight.data_ptr() or name, weight.shape)
        names, _ = unique.setdefault(key, ([], weight.detach()))
        names.append(name)
    return list(unique.values())


def pack_tensor(
    weight_OI: Tensor, spec: dict[str, Any] | None, sparse: bool, dtype: torch.dtype
) -> Parts | None:
    """Pack one tensor.

    Args:
        weight_OI: the weight; if quantized, its values are those of the quantizer.
        spec: the fields of its `QuantSpec`; None: not quantized.
        sparse: whether zeros are left out if that takes fewer bytes.
        dtype: float type of weights that are not quantized.

    Returns:
        The parts that the container stores; None if they do not take fewer bytes than the tensor.
    """
    weight_N = weight_OI.contiguous().flatten()
    mask_N = weight_N != 0
    if spec is None:
        values = weight_N[mask_N].to(dtype)
        mask_size = len(mask_N) / (8 * values.element_size())
        if not sparse or len(values) + mask_size >= len(mask_N):
            return None
        return {"mask": container.pack_bits(mask_N.byte(), 1), "values": values}
    qweight_OI, parts = quantize_weight(weight_OI, QuantSpec(**spec), sparse)
    qweight_N, bits = qweight_OI.flatten(), spec["bits"]
    masked_bits = int(mask_N.sum()) * bits + len(mask_N)
    if sparse and (spec["method"] == "codebook" or masked_bits < len(mask_N) * bits):
        parts["mask"], qweight_N = container.pack_bits(mask_N.byte(), 1), qweight_N[mask_N]
    return parts | {"codes": container.pack_bits(qweight_N, bits)}


def deflated(parts: Parts) -> Parts:
    """The parts that zlib makes smaller, deflated."""
    candidates = {
        part: container.deflate(parts[part]) for part in ("mask", "codes") if part in parts
    }
    return {part: tensor for part, tensor in candidates.items() if len(tensor) < len(parts[part])}


def _check(name: str, weight: Tensor, unpacked: Tensor) -> None:
    if not torch.equal(weight.float(), unpacked.float()):
        difference = float((weight.float() - unpacked.float()).abs().max())
        raise RunFailed(
            f"{name} unpacks to weights that differ by up to {difference:.2g}, but they must equal "
            "the trained ones: train it again, or choose export.format=dense"
        )


def to_dense(folder: Path, to: Path) -> Path:
    """Write the weights of a container as ordinary ones in float32.

    Args:
        folder: an export of `format=packed`.
        to: a new folder; it holds code only if the config cannot describe the model.

    Raises:
        UserError: if there is no container, or the new folder exists.
    """
    if not (folder / container.FILE).is_file():
        raise UserError(
            f"packed is {folder}, but there is no {container.FILE} in it: "
            "give a folder that format=packed wrote"
        )
    if to.exists():
        raise UserError(f"to is {to}, but that exists: name a new folder")
    with translate_errors(str(folder), "packed"), silence_transformers():
        model = container.CompressedModel.from_pretrained(str(folder), dtype=torch.float32)
    models.save(model, models.load_tokenizer(str(folder), "packed"), to)
    return to
