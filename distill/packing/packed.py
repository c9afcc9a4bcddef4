"""Weights -> `packed.safetensors`, whose layout is that of `runtime/container.py`; and a folder of it -> a dense one."""

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
from distill.models.loading import silence_transformers, translate_errors, write_auto_map
from distill.remote_code import container
from distill.remote_code.modeling import compression_of

Parts = dict[str, Tensor]


def save(model: PreTrainedModel, tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """The container, config, tokenizer and code. The model answers in float32, whatever the type of what is stored dense."""
    tensors, metadata = pack(
        model.state_dict(), compression_of(model.config), transposed(model), dtype
    )
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    with silence_transformers():
        model.config.save_pretrained(target)
        if model.can_generate():
            model.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
    write_auto_map(model, target, code=True)
    save_file(tensors, target / container.FILE, metadata)
    (target / container.FILE).chmod((target / "config.json").stat().st_mode)


def transposed(model: torch.nn.Module) -> set[str]:
    """The names of the weights that are stored as (in, out): GPT-2's."""
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }


def pack(
    weights: dict[str, Tensor],
    compression: dict[str, Any],
    transposed: set[str],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict -> the tensors and metadata of a container, proven to unpack to what was given. Tied weights are stored once.

    Codes are found again in weights that lie on a quantizer's grid: it is idempotent. What is neither quantized nor pruned is
    stored as `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for names, weight in unique_tensors(weights):
        spec = next(
            (
                compression["weights"][name]
                for name in names
                if name in compression.get("weights", {})
            ),
            None,
        )
        sparse = any(name in compression.get("sparse", []) for name in names)
        turned = any(name in transposed for name in names)
        parts = pack_tensor(weight.T if turned else weight, spec, sparse, dtype)
        if parts is None:
            tensors[names[0]] = weight.to(
                dtype if weight.is_floating_point() else weight.dtype
            ).contiguous()
            continue
        smaller = deflated(parts)
        entries[names[0]] = {
            "shape": list(weight.shape),
            "transposed": turned,
            "spec": spec,
            "deflated": list(smaller),
        }
        _check(
            names[0],
            weight if spec else weight.to(dtype),
            container.tensor_of(entries[names[0]], parts | smaller),
        )
        tensors |= {f"{names[0]}:{part}": tensor for part, tensor in (parts | smaller).items()}
    packed = json.dumps(entries)
    return tensors, {
        "format": "pt",
        "version": container.VERSION,
        "digest": container.digest(tensors, packed),
        "packed": packed,
    }


def unique_tensors(weights: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Each tensor with all its names, the first of which stores it; tied ones have several."""
    found: dict[tuple[int | str, torch.Size], tuple[list[str], Tensor]] = {}
    for name, weight in weights.items():
        found.setdefault((weight.data_ptr() or name, weight.shape), ([], weight.detach()))[
            0
        ].append(name)
    return list(found.values())


def pack_tensor(
    weight_OI: Tensor, spec: dict[str, Any] | None, sparse: bool, dtype: torch.dtype
) -> Parts | None:
    """What the container stores of one tensor; null where it is no smaller than the tensor itself."""
    weight_N = weight_OI.contiguous().flatten()
    mask_N = weight_N != 0
    if spec is None:
        values = weight_N[mask_N].to(dtype)
        smaller = sparse and len(values) + len(mask_N) / (8 * values.element_size()) < len(mask_N)
        return (
            {"mask": container.pack_bits(mask_N.byte(), 1), "values": values} if smaller else None
        )
    codes_OI, parts = quantize_weight(weight_OI, QuantSpec(**spec), sparse)
    codes_N, bits = codes_OI.flatten(), spec["bits"]
    if sparse and (
        spec["method"] == "codebook" or int(mask_N.sum()) * bits + len(mask_N) < len(mask_N) * bits
    ):
        parts["mask"], codes_N = container.pack_bits(mask_N.byte(), 1), codes_N[mask_N]
    return parts | {"codes": container.pack_bits(codes_N, bits)}


def deflated(parts: Parts) -> Parts:
    """Those of the parts that zlib makes smaller."""
    tried = {part: container.deflated(parts[part]) for part in ("mask", "codes") if part in parts}
    return {part: tensor for part, tensor in tried.items() if len(tensor) < len(parts[part])}


def _check(name: str, given: Tensor, unpacked: Tensor) -> None:
    if not torch.equal(given.float(), unpacked.float()):
        apart = float((given.float() - unpacked.float()).abs().max())
        raise RunFailed(
            f"{name} unpacks to weights that differ by up to {apart:.2g}, but they must be those that were trained: "
            "train it again, or choose export.format=dense"
        )


def to_dense(folder: Path, to: Path) -> Path:
    """A container's folder -> one of ordinary weights in float32; with code beside them only where the config does not say enough."""
    if not (folder / container.FILE).is_file():
        raise UserError(
            f"packed is {folder}, but there is no {container.FILE} in it: give a folder that format=packed wrote"
        )
    if to.exists():
        raise UserError(f"to is {to}, but that exists: name a new folder")
    with translate_errors(str(folder), "packed"), silence_transformers():
        model = container.CompressedModel.from_pretrained(str(folder), dtype=torch.float32)
    models.save(model, models.load_tokenizer(str(folder), "packed"), to)
    return to
