"""The header of a safetensors file, in an order of its own."""

import json
from pathlib import Path

_SIZE_BYTES = 8  # the length of the header, little-endian


def sort_metadata(file: Path) -> None:
    """Write the metadata of a safetensors file sorted by name; the other bytes stay.

    The library writes them in an order that is random in each process, so that two exports of the
    same weights would differ.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(_SIZE_BYTES), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # the library pads it with spaces
        stream.seek(_SIZE_BYTES)
        stream.write(text.ljust(size))
