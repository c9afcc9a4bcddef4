"""`packed.safetensors`: the file format of tensors of 2 to 8 bits an entry, and loading it.

This file and `modeling.py` are copied into every export that transformers cannot load without them.
They need torch, safetensors and transformers only:

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

Layout, version 1. A tensor that is not packed is stored under its own name. For a packed tensor
NAME the file holds some of

| tensor         | type, shape         | contents                                                  |
|----------------|---------------------|-----------------------------------------------------------|
| NAME:mask      | uint8 (n/8,)        | a bit for each entry, 1 where it is not 0; default: all 1 |
| NAME:codes     | uint8 (k*bits/8,)   | `bits` bits for each stored entry: its quantized value    |
| NAME:values    | float (k,)          | the stored entries themselves, where not quantized        |
| NAME:scale     | float16 (G,)        | linear, nf4: scale of each group                          |
| NAME:zero      | uint8 (G,)          | linear: zero point of each group; default: middle value   |
| NAME:centroids | float16 (G, 2^bits) | codebook: the value of each code                          |

n = entries, k = stored entries, G = groups of n/G neighbors; sizes in bytes are rounded up.
`dequantize` of modeling.py computes weights from them. Bits are packed little-endian without gaps:
entry i takes the bits i*bits to (i+1)*bits - 1 of the stream, and bit b of the stream is bit b % 8
of byte b // 8. Masks and codes that zlib makes smaller are stored deflated. Entries are stored row
by row, a row for each output feature; Conv1D weights, which are (in, out), are stored transposed.

Metadata: `version`, `digest` (see :func:`digest`), and `packed`, a JSON object
NAME -> {"shape", "transposed", "spec", "deflated"}. spec is empty for tensors that are not
quantized, else {"method": "linear", "codebook" or "nf4", "bits", "symmetric", "group"}; deflated
lists parts.
"""

import hashlib
import json
import math
import shutil
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from .modeling import CompressionConfig, build_compressed_layers, dequantize

FILE = "packed.safetensors"
CODE_FILES = (Path(__file__), Path(__file__).with_name("modeling.py"))
VERSION = "1"
_CHUNK = 8  # values of any number of bits that fill a whole number of bytes
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision"}
_HUB_OPTIONS |= {"subfolder", "token"}


def pack_bits(values_N: Tensor, bits: int) -> Tensor:
    """Pack uint8 values below 2^bits into ceil(N * bits / 8) bytes, little-endian without gaps."""
    if bits == 8:
        return values_N.clone()
    values_C8 = torch.nn.functional.pad(values_N, (0, -len(values_N) % _CHUNK)).view(-1, _CHUNK)
    words_C = torch.zeros(len(values_C8), dtype=torch.int64)
    for place in range(_CHUNK):
        words_C |= values_C8[:, place].long() << (place * bits)
    packed_Cb = torch.stack([(words_C >> (8 * byte)) & 255 for byte in range(bits)], dim=1)
    return packed_Cb.to(torch.uint8).flatten()[: math.ceil(len(values_N) * bits / 8)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: `count` values, uint8."""
    if bits == 8:
        return packed[:count]
    bytes_Cb = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words_C = torch.zeros(len(bytes_Cb), dtype=torch.int64)
    for byte in range(bits):
        words_C |= bytes_Cb[:, byte].long() << (8 * byte)
    shifted = [words_C >> (place * bits) for place in range(_CHUNK)]
    values_C8 = torch.stack([(word & (2**bits - 1)).to(torch.uint8) for word in shifted], dim=1)
    return values_C8.flatten()[:count]


def deflate(part: Tensor) -> Tensor:
    """The bytes of a tensor compressed by zlib: 8-bit weights lose a tenth, sparse masks half."""
    return torch.frombuffer(bytearray(zlib.compress(part.numpy().tobytes())), dtype=torch.uint8)


def inflate(part: Tensor) -> Tensor:
    """The inverse of :func:`deflate`."""
    return torch.frombuffer(bytearray(zlib.decompress(part.numpy().tobytes())), dtype=torch.uint8)


def unpack_tensor(entry: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """One packed tensor in its own shape.

    Args:
        entry: its entry in the metadata.
        parts: its stored tensors, by the last part of their names (mask, codes, ...).
    """
    shape = list(reversed(entry["shape"])) if entry["transposed"] else entry["shape"]
    count, spec = math.prod(shape), entry["spec"]
    parts = parts | {name: inflate(parts[name]) for name in entry["deflated"]}
    mask_N = torch.ones(count, dtype=torch.bool)
    if "mask" in parts:
        mask_N = unpack_bits(parts["mask"], 1, count).bool()
    if spec is None:
        weight_N = _scatter(parts["values"], mask_N)
    else:
        stored = unpack_bits(parts["codes"], spec["bits"], int(mask_N.sum()))
        qweight = _scatter(stored, mask_N).view(shape)
        weight_N = dequantize(qweight, parts, spec).flatten().where(mask_N, 0.0)
    weight = weight_N.view(shape)
    return weight.T.contiguous() if entry["transposed"] else weight


def _scatter(stored: Tensor, mask_N: Tensor) -> Tensor:
    """The stored entries where the mask is True, 0 elsewhere."""
    return torch.zeros(len(mask_N), dtype=stored.dtype).masked_scatter_(mask_N, stored)


def digest(tensors: dict[str, Tensor], packed: str) -> str:
    """SHA-256 of the metadata `packed`, then of the names and bytes of all tensors, by name."""
    total = hashlib.sha256(packed.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """All tensors of a container under their own names.

    Raises:
        ValueError: if the version is another one, or the file is damaged.
    """
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{FILE} has the layout {metadata.get('version')}, but this code reads {VERSION}: "
            "use the code in its own folder"
        )
    if digest(tensors, metadata["packed"]) != metadata["digest"]:
        raise ValueError(
            f"{FILE} is damaged, its bytes are not those that were written: "
            "export or download it again"
        )
    entries = json.loads(metadata["packed"])
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in entries}
    unpacked = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(":")
        if owner in parts:
            parts[owner][part] = tensor
        else:
            unpacked[name] = tensor
    return unpacked | {name: unpack_tensor(entry, parts[name]) for name, entry in entries.items()}


def read(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a container."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return unpack(tensors, stored.metadata() or {})


class CompressedModel:
    """The class that `auto_map` in config.json names.

    :meth:`from_pretrained` returns an instance of transformers' class for the architecture, with
    the layers that `config.compression` describes.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: the instances are of transformers' own class."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """Load a model as transformers' `from_pretrained` does, from the container if there is one.

        Args:
            path: a folder, or a name on the Hub.
            args: passed on to transformers.
            config: loaded from `path` by default.
            options: passed on to transformers.
        """
        hub = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
        config = AutoConfig.from_pretrained(path, **hub) if config is None else config
        architecture = compressed_class(getattr(transformers, config.architectures[0]))
        file = _optional_file(path, FILE, hub)
        if file is None:
            return architecture.from_pretrained(path, *args, config=config, **options)
        loaded = architecture.from_pretrained(
            None, *args, config=config, state_dict=read(file), **options
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(path)
        if not needs_code(model.config):
            model.config.auto_map = {}  # once unpacked it is saved as an ordinary model
        if _optional_file(path, "generation_config.json", hub) is not None:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        return loaded


def _optional_file(path: Any, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def needs_code(config: Any) -> bool:
    """Whether a model with this config needs the files of this package to load."""
    return CompressionConfig.from_config(config).needs_code


def copy_code(folder: Path) -> None:
    """Copy the files of this package into a folder."""
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


@lru_cache
def compressed_class(architecture: type) -> Any:
    """A subclass, of the same name, that builds the layers that `config.compression` describes."""

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        architecture.__init__(self, config, *args, **options)  # type: ignore[misc]
        build_compressed_layers(self, CompressionConfig.from_config(config))

    def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        architecture.save_pretrained(self, folder, *args, **options)  # type: ignore[attr-defined]
        if needs_code(self.config):
            copy_code(Path(folder))

    members = {
        "__init__": build,
        "save_pretrained": save_pretrained,
        "__module__": architecture.__module__,
    }
    return type(architecture.__name__, (architecture,), members)
