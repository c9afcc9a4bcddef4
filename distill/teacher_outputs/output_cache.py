"""Examples -> a file of a teacher's outputs, in chunks that are divided among the ranks.

The file's bytes do not depend on the number of ranks. N = rows, W = stored numbers per row.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from distill import data, models, store
from distill.errors import UserError
from distill.processes import fsdp, ranks
from distill.processes.memory import keep_freed_memory
from distill.stages import show_progress
from distill.teacher_outputs.outputs import TeacherOutputs

OUTPUTS_FILE = "outputs.arrow"
CHUNK_BYTES = 1 << 26  # outputs in memory at a time
CHUNK_EXAMPLES = 2048  # maximum; the examples of a chunk are sorted by length
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Forward:
    """Settings of a teacher's forward passes outside of a Trainer.

    Args:
        device: ``cpu`` or ``cuda``.
        batch_size: examples of a forward pass.
        sharded: whether the teacher's parameters are split over the ranks (FSDP).
        progress: whether a progress bar is drawn.
    """

    device: str
    batch_size: int
    sharded: bool = False
    progress: bool = False


def write_outputs(
    entry: Path, outputs: TeacherOutputs, examples: Dataset, pad_id: int, forward: Forward
) -> None:
    """Compute the outputs of all examples into a store entry."""
    write_shares(
        entry,
        OUTPUTS_FILE,
        lambda file: _write_share(outputs, examples, pad_id, forward, file),
    )


def write_shares(entry: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write a store entry of one Arrow stream, of which each rank writes every world-th chunk.

    Args:
        entry: The folder.
        name: The file in it.
        write: Writes the chunks of this rank to a file; rank zero joins them.
    """
    if ranks.world_size() == 1:
        with store.write_entry(entry) as folder:
            write(folder / name)
        return
    is_first = ranks.is_rank_zero()
    with store.temporary_folder(entry.parent) if is_first else nullcontext(Path()) as temporary:
        shares = ranks.broadcast(temporary)
        write(shares / f"{ranks.rank()}.arrow")
        ranks.barrier()
        if is_first:
            files = [shares / f"{rank}.arrow" for rank in range(ranks.world_size())]
            with store.write_entry(entry) as folder:
                _join(files, folder / name)
    ranks.barrier()


def check_disk_space(row_bytes: float, name: str, examples: Dataset) -> None:
    """Check that the outputs fill at most half of the store's disk.

    Args:
        row_bytes: maximum bytes of a row in the file.
        name: `teacher.outputs`.
        examples: encoded examples, with their numbers of rows.

    Raises:
        UserError: if they would fill more of it.
    """
    size = row_bytes * int(np.sum(examples.with_format("numpy")["rows"][:]))
    store.cache_root().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.cache_root()).free
    if size > free / 2:
        raise UserError(
            f"teacher.outputs is {name}, but these outputs take {size / 1e9:.1f} GB and must leave "
            f"half of the {free / 1e9:.1f} GB that are free at {store.cache_root()}: set "
            "teacher.outputs=online, or DISTILL_CACHE to a larger disk"
        )


def _join(files: list[Path], joined: Path) -> None:
    """Write the chunks of all ranks in the order of the examples."""
    with ExitStack() as stack:
        streams = [
            pa.ipc.open_stream(stack.enter_context(pa.memory_map(str(file)))) for file in files
        ]
        writer = stack.enter_context(pa.ipc.new_stream(str(joined), streams[0].schema))
        for chunks in zip_longest(*streams):
            for chunk in (chunk for chunk in chunks if chunk is not None):
                writer.write_batch(chunk)


def _write_share(
    outputs: TeacherOutputs, examples: Dataset, pad_id: int, forward: Forward, file: Path
) -> None:
    """Compute and write this rank's chunks, the longest examples of each first."""
    width = -(-outputs.width * np.dtype(outputs.dtype).itemsize // FLOAT_BYTES)
    chunks = split_chunks(examples, width)[ranks.rank() :: ranks.world_size()]
    schema = outputs.schema()
    missing = _missing_forwards(chunks, forward.batch_size) if forward.sharded else 0
    bar = Progress(console=Console(), transient=True, disable=not show_progress(forward.progress))
    with (
        on_device(outputs, forward),
        keep_freed_memory(),
        bar,
        pa.ipc.new_stream(str(file), schema) as stream,
        ThreadPoolExecutor(1) as writer,
    ):
        bar_id = bar.add_task("teacher outputs", total=sum(map(len, chunks)))
        written: Future[None] | None = None
        for chunk in chunks:
            pinned = outputs.teacher.device.type == "cuda"
            batching = data.Batching(forward.batch_size, pinned=pinned)
            loader = data.make_loader(examples.select(chunk), outputs.task, pad_id, batching)
            rows = run_teacher(outputs, loader, chunk, lambda count: bar.advance(bar_id, count))
            if written is not None:  # at most two chunks are in memory
                written.result()
            written = writer.submit(_write, stream, outputs, rows, schema)
        if written is not None:
            written.result()
        for _ in range(missing):
            loader = data.make_loader(examples.select([0]), outputs.task, pad_id, data.Batching(1))
            run_teacher(outputs, loader, range(1), lambda _: None)


def _write(
    stream: pa.ipc.RecordBatchStreamWriter,
    outputs: TeacherOutputs,
    rows: "ChunkRows",
    schema: pa.Schema,
) -> None:
    stream.write_batch(pa.record_batch(to_columns(outputs, rows), schema=schema))


def _missing_forwards(chunks: list[range], batch_size: int) -> int:
    """Forward passes to add, since all ranks take part in each one of a sharded teacher."""
    forwards = ranks.all_gather(sum(-(-len(chunk) // batch_size) for chunk in chunks))
    return max(forwards) - forwards[ranks.rank()]


@contextmanager
def on_device(outputs: TeacherOutputs, forward: Forward) -> Iterator[None]:
    """Move the teacher to the device, or shard it over all ranks, inside the context."""
    teacher = outputs.teacher
    if not forward.sharded:
        with models.on_device(forward.device, teacher):
            yield
        return
    outputs.teacher = fsdp.shard(teacher, models.blocks, fsdp.device_mesh(forward.device))
    yield
    outputs.teacher = teacher


def split_chunks(examples: Dataset, width: int) -> list[range]:
    """Split examples into ranges whose outputs take about CHUNK_BYTES, of at most CHUNK_EXAMPLES.

    Args:
        examples: encoded examples, with their numbers of rows in the column `rows`.
        width: size of a row, in float32 numbers.
    """
    rows = np.asarray(examples.with_format("numpy")["rows"][:], dtype=np.int64)
    by_size = (rows.cumsum() - rows) * width * FLOAT_BYTES // CHUNK_BYTES
    ends = np.flatnonzero(np.diff(by_size)) + 1
    edges = [0, *ends.tolist(), len(rows)]
    return [
        range(start, min(start + CHUNK_EXAMPLES, end))
        for first, end in pairwise(edges)
        for start in range(first, end, CHUNK_EXAMPLES)
    ]


class ChunkRows(NamedTuple):
    """The rows of a chunk's examples, batch by batch."""

    parts: list[np.ndarray]  # (N, W)
    examples: list[np.ndarray]  # the example that each row belongs to, (N,)
    number: int  # examples


@torch.inference_mode()
def run_teacher(
    outputs: TeacherOutputs, loader: data.Loader, numbers: range, advance: Callable[[int], None]
) -> ChunkRows:
    """Run the teacher on a loader's examples.

    Batches are collated by a thread, and the copy of a batch's rows to the CPU is waited for once
    the next batch has been given to the device.

    Args:
        outputs: computes the rows.
        loader: batches of the examples.
        numbers: indices of the examples in the split.
        advance: called with the number of examples after each batch.
    """
    device = outputs.teacher.device
    copies: list[_CopyToCpu] = []
    places: list[np.ndarray] = []
    for micro, batch in zip(loader.plan, loader, strict=True):
        moved = move_data_to_device(batch, device)._replace(example=batch.example)
        examples = np.asarray(micro.indices)
        rows_NW = outputs.rows(moved, numbers.start + examples)
        copies.append(_CopyToCpu(rows_NW))
        places.append(examples[batch.example.numpy()])
        advance(len(micro.indices))
    return ChunkRows([copy.result() for copy in copies], places, len(loader.plan.lengths))


class _CopyToCpu:
    """A copy to the CPU that a GPU makes while it computes further batches."""

    def __init__(self, rows_NW: Tensor) -> None:
        self.done = None
        if rows_NW.is_cuda:
            target = torch.empty(rows_NW.shape, dtype=rows_NW.dtype, pin_memory=True)
            target.copy_(rows_NW, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
            rows_NW = target
        self.rows_NW = rows_NW

    def result(self) -> np.ndarray:
        if self.done is not None:
            self.done.synchronize()
        return self.rows_NW.numpy()


def to_columns(outputs: TeacherOutputs, rows: ChunkRows) -> dict[str, pa.Array]:
    """The stored columns of a chunk's examples, in dataset order."""
    example_N = np.concatenate(rows.examples)
    values_NW = np.concatenate(rows.parts)[np.argsort(example_N, kind="stable")]
    return outputs.columns(values_NW, np.bincount(example_N, minlength=rows.number).cumsum())
