"""`packed.safetensors` -> a model: tensors of 2 to 8 bits an entry, and what loads them through transformers.

This file and `modeling.py` travel with every folder whose config alone does not say how to load it. They need torch,
safetensors and transformers, and nothing of the library that wrote them:

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

The layout, version 1. A tensor that is not packed is stored under its own name. Of a packed tensor NAME the file holds some of

| tensor         | type, shape        | what it is                                                                        |
|----------------|--------------------|-----------------------------------------------------------------------------------|
| NAME:mask      | uint8 (n/8,)       | one bit per entry, 1 where it is not zero; without it every entry is stored       |
| NAME:codes     | uint8 (k*bits/8,)  | a code of `bits` bits for each stored entry                                       |
| NAME:values    | float (k,)         | the stored entries themselves, where they have no codes                           |
| NAME:scale     | float16 (G,)       | linear, nf4: what the level of a code is multiplied with                          |
| NAME:zero      | uint8 (G,)         | linear: the code whose level is 0; without it that is the middle one              |
| NAME:centroids | float16 (G, 2^bits)| codebook: the level of each code                                                  |

n = entries, k = stored ones, G = groups of n/G neighbours; sizes in bytes are rounded up. `values` of modeling.py says what codes
mean. Bits are packed little-endian without gaps: entry i takes the bits i*bits to (i+1)*bits - 1 of the stream, and bit b of the
stream is bit b % 8 of byte b // 8. Masks and codes that zlib makes smaller are stored deflated. Entries go row by row, an output
feature a row; GPT-2's layers, whose matrices are (in, out), are stored transposed.

Metadata: `version`, `digest` (see :func:`digest`), and `packed`, a JSON object: NAME -> {"shape", "transposed", "spec", "deflated"},
where spec is null or {"method": "linear", "codebook" or "nf4", "bits", "symmetric", "group"}, and deflated lists parts.
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

from .modeling import apply, compression_of, dequantize

FILE = "packed.safetensors"
CODE_FILES = (Path(__file__), Path(__file__).with_name("modeling.py"))
VERSION = "1"
CODES = 8  # codes whose bits fill whole bytes, at any number of bits
FETCHING = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def pack_bits(codes_N: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 -> ceil(N * bits / 8) bytes, little-endian without gaps."""
    if bits == CODES:
        return codes_N.clone()
    groups_G8 = torch.nn.functional.pad(codes_N, (0, -len(codes_N) % CODES)).view(-1, CODES)
    words_G = torch.zeros(len(groups_G8), dtype=torch.int64)
    for place in range(CODES):
        words_G |= groups_G8[:, place].long() << (place * bits)
    packed_Gb = torch.stack([(words_G >> (8 * byte)) & 255 for byte in range(bits)], dim=1)
    return packed_Gb.to(torch.uint8).flatten()[: math.ceil(len(codes_N) * bits / 8)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: `count` codes, uint8."""
    if bits == CODES:
        return packed[:count]
    bytes_Gb = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words_G = torch.zeros(len(bytes_Gb), dtype=torch.int64)
    for byte in range(bits):
        words_G |= bytes_Gb[:, byte].long() << (8 * byte)
    codes_G8 = torch.stack(
        [((words_G >> (place * bits)) & (2**bits - 1)).to(torch.uint8) for place in range(CODES)],
        dim=1,
    )
    return codes_G8.flatten()[:count]


def deflated(part: Tensor) -> Tensor:
    """The same bytes, compressed: codes of 8 bits lose a tenth, masks of many zeros half."""
    return torch.frombuffer(bytearray(zlib.compress(part.numpy().tobytes())), dtype=torch.uint8)


def inflated(part: Tensor) -> Tensor:
    """The inverse of :func:`deflated`."""
    return torch.frombuffer(bytearray(zlib.decompress(part.numpy().tobytes())), dtype=torch.uint8)


def tensor_of(entry: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """One packed tensor, in its own shape."""
    shape = list(reversed(entry["shape"])) if entry["transposed"] else entry["shape"]
    count, spec = math.prod(shape), entry["spec"]
    parts = parts | {name: inflated(parts[name]) for name in entry["deflated"]}
    mask_N = (
        unpack_bits(parts["mask"], 1, count).bool()
        if "mask" in parts
        else torch.ones(count, dtype=torch.bool)
    )
    if spec is None:
        full_N = _spread(parts["values"], mask_N)
    else:
        stored = unpack_bits(parts["codes"], spec["bits"], int(mask_N.sum()))
        full_N = (
            dequantize(_spread(stored, mask_N).view(shape), parts, spec)
            .flatten()
            .where(mask_N, 0.0)
        )
    return full_N.view(shape).T.contiguous() if entry["transposed"] else full_N.view(shape)


def _spread(stored: Tensor, mask_N: Tensor) -> Tensor:
    """The stored entries at their places, zero elsewhere."""
    return torch.zeros(len(mask_N), dtype=stored.dtype).masked_scatter_(mask_N, stored)


def digest(tensors: dict[str, Tensor], packed: str) -> str:
    """sha256 over `packed` and, in the order of their names, over name and bytes of all stored tensors."""
    total = hashlib.sha256(packed.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """All tensors of a container under their own names; ValueError, in one sentence, where it is not what was written."""
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{FILE} has the layout {metadata.get('version')}, but this code reads {VERSION}: take the code of its own folder"
        )
    if digest(tensors, metadata["packed"]) != metadata["digest"]:
        raise ValueError(
            f"{FILE} is damaged, its bytes are not those that were written: export or download it again"
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
    return unpacked | {name: tensor_of(entry, parts[name]) for name, entry in entries.items()}


def read(file: str | Path) -> dict[str, Tensor]:
    """The state dict that a container holds."""
    with safe_open(file, framework="pt") as stored:
        return unpack(
            {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}
        )  # noqa: SIM118


class CompressedModel:
    """What `auto_map` names: not a model itself, but what makes an instance of the architecture in the form that was stored."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: the instance is of transformers' own class."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """As `from_pretrained` of transformers' classes, which does the work: the weights from the container where there is one."""
        fetching = {key: value for key, value in options.items() if key in FETCHING}
        config = AutoConfig.from_pretrained(path, **fetching) if config is None else config
        built = shaped(getattr(transformers, config.architectures[0]))
        file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False, **fetching)
        if file is None:
            return built.from_pretrained(path, *args, config=config, **options)
        loaded = built.from_pretrained(None, *args, config=config, state_dict=read(file), **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(path)
        if not needs_code(model.config):
            model.config.auto_map = {}  # unpacked it is an ordinary model, and saved again an ordinary folder
        if (
            cached_file(
                path,
                "generation_config.json",
                _raise_exceptions_for_missing_entries=False,
                **fetching,
            )
            is not None
        ):
            model.generation_config = GenerationConfig.from_pretrained(path, **fetching)
        return loaded


def needs_code(config: Any) -> bool:
    """Whether the model's form is more than its config's own keys say."""
    return any(compression_of(config).get(part) for part in ("shapes", "low_rank", "activations"))


def put_code(folder: Path) -> None:
    """The files that travel with a model, beside its weights."""
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


@lru_cache
def shaped(architecture: type) -> Any:
    """The architecture's class, of the same name, whose instances are built in the form that `config.compression` says."""

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        architecture.__init__(self, config, *args, **options)  # type: ignore[misc]
        apply(self, compression_of(config))

    def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        architecture.save_pretrained(self, folder, *args, **options)  # type: ignore[attr-defined]
        if needs_code(self.config):
            put_code(Path(folder))

    members = {
        "__init__": build,
        "save_pretrained": save_pretrained,
        "__module__": architecture.__module__,
    }
    return type(architecture.__name__, (architecture,), members)
