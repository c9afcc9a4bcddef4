"""How many rows of logits are in memory at once, by the device."""

from collections.abc import Iterator

import torch

CHUNK_BYTES = 1 << 25  # float32 logits of a chunk on a CPU; enough for an efficient matrix product
# If not all logits fit into one chunk, a chunk has at most max(MIN_ROWS, 1 / SHARE of the rows), so
# that it needs little memory compared with all hidden states.
SHARE, MIN_ROWS = 16, 64
# Bytes of float32 logits per call of the loss on a CPU: intermediate results fit into its cache.
CACHE_BYTES = 1 << 20
# A GPU reads the head and its gradient once per chunk, so chunks are larger: float32 logits take at
# most 1 / GPU_SHARE of its memory, and a call of the loss 1 / GPU_CALL_SHARE. It is the memory of
# the card, not what is free, so that a run that is repeated adds in the same order.
GPU_SHARE, GPU_CALL_SHARE, GPU_MIN_CHUNKS = 128, 1024, 4
TILE = 128  # rows that a GPU multiplies together


def chunk_rows(rows: int, width: int, memory: int | None = None) -> int:
    """Rows of a chunk.

    Args:
        rows: All rows.
        width: Logits of a row.
        memory: Bytes of memory of a GPU; None for a CPU.
    """
    if memory is None:
        most = rows_within(width, CHUNK_BYTES)
        return most if rows <= most else min(most, max(MIN_ROWS, rows // SHARE))
    most = max(1, rows_within(width, memory // GPU_SHARE) // TILE) * TILE
    if rows <= most:
        return most
    chunks = -(-rows // min(most, -(-rows // GPU_MIN_CHUNKS)))
    return -(-rows // (chunks * TILE)) * TILE


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def chunk_bytes(device: torch.device) -> int:
    """Bytes of float32 logits of a chunk whose gradient is not needed."""
    memory = device_memory(device)
    return CHUNK_BYTES if memory is None else memory // GPU_SHARE


def rows_within(width: int, size: int) -> int:
    """Rows of `width` float32 numbers that fit into `size` bytes, at least 1."""
    return max(1, size // (4 * width))


def chunk_slices(rows: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover all rows; one empty slice if there are no rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def bytes_per_call(memory: int | None) -> int:
    """Bytes of float32 logits per call of a loss that autograd differentiates.

    Args:
        memory: Bytes of memory of a GPU; None for a CPU.
    """
    return CACHE_BYTES if memory is None else max(CHUNK_BYTES, memory // GPU_CALL_SHARE)
