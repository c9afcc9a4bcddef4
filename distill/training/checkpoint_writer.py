"""Writes checkpoints in a thread, from a copy of the state, while training goes on.

The copy is made on the state's own device where that has room, else in the host's memory. One
checkpoint is written at a time; the next one waits for it. An error of the thread is raised by the
next call here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from distill import internals, store
from distill.errors import RunFailed
from distill.training import checkpoint_files as files

__all__ = ["AtomicCheckpointIO", "snapshot"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint atomically and in the background, after its checksum.

    Loads tensors and plain values only, so that a file cannot execute code.

    Args:
        keep: number of the newest checkpoints that are kept, besides the best ones that they refer
            to; None keeps all.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Copy the state and start to write it; an earlier one is complete first."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written = self._thread.submit(_write, snapshot(checkpoint), Path(path), self.keep)

    def is_idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._written is None or self._written.done()

    def raise_errors(self) -> None:
        """Raise the error of a checkpoint that could not be written, without waiting for one."""
        if self.is_idle():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; RunFailed if it cannot be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def teardown(self) -> None:
        """Wait, and end the thread; the Trainer calls this however training ends."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        self.wait()
        # Moments of 8 bits cannot be loaded with a function.
        return super().load_checkpoint(path, "cpu", weights_only=True)  # type: ignore[arg-type]


# ---- copies


def snapshot(state: Any) -> Any:
    """A copy of nested dictionaries and lists of tensors, which training may change afterwards.

    Tensors that share their values share them in the copy too. Those of a GPU stay there if a tenth
    of its memory is still free then, and are copied to the host otherwise.
    """
    tensors = list(_tensors(state))
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    places = {_place(tensor): tensor for tensor in tensors}
    size = sum(tensor.nbytes for tensor in places.values() if tensor.is_cuda)
    to_host = device is not None and not _has_room(size, device)
    copies = {place: _copy(tensor, to_host) for place, tensor in places.items()}
    if device is not None:
        torch.cuda.synchronize(device)
    return deepcopy(state, {id(tensor): copies[_place(tensor)] for tensor in tensors})


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _place(tensor: Tensor) -> Any:
    """Equal for tensors that are the same values in memory."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _copy(tensor: Any, to_host: bool) -> Tensor:
    tensor = tensor.detach()
    if internals.is_wrapper(tensor):  # moments of 8 bits, which cannot be cloned
        names, context = tensor.__tensor_flatten__()
        parts = {name: _copy(getattr(tensor, name), to_host) for name in names}
        unflatten = type(tensor).__tensor_unflatten__
        return unflatten(parts, context, tensor.shape, tensor.stride())
    if not (to_host and tensor.is_cuda):
        return tensor.clone()
    if type(tensor) is not Tensor:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _has_room(size: int, device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    return free - size >= total / 10


def _on_host(state: Any) -> Any:
    """The state with all tensors on the CPU; copies do not wait for the kernels of training."""
    tensors = list(_tensors(state))
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return state
    with torch.cuda.stream(torch.cuda.Stream(device)):
        places = {_place(tensor): tensor.cpu() for tensor in tensors}
    return deepcopy(state, {id(tensor): places[_place(tensor)] for tensor in tensors})


# ---- in the thread


class _HashedStream:
    """A stream that hashes what is written to it, at the same time.

    An error is kept for :meth:`checksum`: `torch.save` cannot be left by an exception.
    """

    def __init__(self, stream: BinaryIO, hashing: ThreadPoolExecutor) -> None:
        self._stream, self._hashing, self._digest = stream, hashing, hashlib.sha256()
        self._error: OSError | None = None

    def write(self, content: Any) -> int:
        if self._error is None:
            hashed = self._hashing.submit(self._digest.update, content)
            try:
                self._stream.write(content)
            except OSError as error:
                self._error = error
            hashed.result()
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Nothing: the file is flushed when it is complete."""

    def checksum(self) -> str:
        """The SHA-256 of everything written; raises the error of the first write that failed."""
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()


def _write(state: dict[str, Any], file: Path, keep: int | None) -> None:
    """Write a checkpoint and its checksum, then remove those that are no longer needed."""
    try:
        with ThreadPoolExecutor(1) as hashing, store.atomic_file(file) as stream:
            hashed = _HashedStream(stream, hashing)
            torch.save(_on_host(state), cast(Any, hashed))
            manifest = {"sha256": hashed.checksum(), files.BEST: state.get(files.BEST)}
            store.write_file(file.with_suffix(".json"), json.dumps(manifest).encode())
    except OSError as error:
        file.with_suffix(".json").unlink(missing_ok=True)
        raise RunFailed(_write_error(file, error)) from error
    if keep is not None:
        files.prune(file.parent, keep)


def _write_error(file: Path, error: OSError) -> str:
    others = [other.name for other in files.newest_first(file.parent) if other != file]
    state = f"{others[0]} is intact" if others else "none was written before"
    return (
        f"{file} cannot be written ({error.strerror}), but a run saves its state there: make room "
        f"and resume it; {state}"
    )
