"""What a training step costs beyond the student's own arithmetic: memory, compilation, an online teacher."""

import ctypes
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.models import blocks, logits
from distill.module import Distillation, eval_mode
from distill.tasks.base import Batch

log = logging.getLogger(__name__)

WARM = 20  # optimizer steps after which nothing is compiled any more, and of which none is timed
TIMED = 200  # steps that are, at the most
TRIM, MMAP = (
    -1,
    -3,
)  # of malloc.h: from how many bytes on freed memory goes back to the system at once
LARGE, LARGE_ONCE = (
    1 << 30,
    1 << 25,
)  # the most that glibc takes since 2.35, and that it took before


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep what a step frees for the next one: glibc hands large blocks back, and the system must then fill new ones with zeros.

    What is free at the end is given back; blocks that come later are kept as well.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    if any(libc.mallopt(MMAP, size) for size in (LARGE, LARGE_ONCE)):
        libc.mallopt(TRIM, LARGE)
    try:
        yield
    finally:
        libc.malloc_trim(0)


class CompileBlocks(Callback):
    """torch.compile of the student's blocks, in place: their names and tensors are what they were. Comes after callbacks that ask it."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        for block in blocks(module.student):
            block.compile()

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self._steps) < WARM:
            self._steps.append(time.perf_counter() - self._began)
            if len(self._steps) == WARM:
                self._say()

    def on_train_end(self, *_: Any) -> None:
        if 0 < len(self._steps) < WARM:
            self._say()

    def _say(self) -> None:
        lost = sum(self._steps) - len(self._steps) * statistics.median(self._steps)
        log.info(
            "compiling the student took %.0f s of its first %d batches", lost, len(self._steps)
        )


class DeviceTimer:
    """Moments of the device that computes, read when it has come to them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        """This moment; on a GPU the one when all that is asked of it so far is done, without waiting for it."""
        moment: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            moment.record()
        self.moments.append(moment)

    def seconds(self) -> list[float]:
        """From each moment to the next one."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self.moments)]
        return [end - begin for begin, end in pairwise(self.moments)]


class OnlineTeacherCost(Callback):
    """Says at the end of training what the teacher's forward added to a step, beside what it may by arithmetic: 1 + F_T / (3 F_S)."""

    def __init__(self) -> None:
        self.bound = self.measured = float("nan")
        self._clock: DeviceTimer | None = None
        self._hooks: list[Any] = []
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        teacher = module._teacher[0]
        self.bound = step_cost_bound(module, teacher, trainer.train_dataloader)
        self._clock, self._batches = DeviceTimer(module.device), 0
        self._hooks = [
            teacher.register_forward_pre_hook(lambda *_: self._mark()),
            teacher.register_forward_hook(lambda *_: self._mark()),
        ]

    def _mark(self) -> None:
        if self._clock is not None and WARM < self._batches <= WARM + TIMED:
            self._clock.mark()

    def on_train_batch_start(self, *_: Any) -> None:
        self._batches += 1
        self._mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self._mark()

    def on_train_end(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        assert self._clock is not None
        parts = self._clock.seconds()  # of each batch: until the teacher begins, the teacher, the rest; then what is between two batches
        answering, whole = sum(parts[1::4]), sum(parts[0::4]) + sum(parts[1::4]) + sum(parts[2::4])
        if answering:
            self.measured = whole / (whole - answering)
        told = f"{self.measured:.2f}" if answering else "? (it had too few steps to tell)"
        log.info(
            "the online teacher makes a step %s times as long; by arithmetic 1 + F_T / (3 F_S) = %.2f",
            told,
            self.bound,
        )


@torch.no_grad()
def step_cost_bound(module: Distillation, teacher: nn.Module, batches: Any) -> float:
    """1 + F_T / (3 F_S), of the forward's operations for one micro-batch."""
    batch: Batch = move_data_to_device(batches.dataset[next(iter(batches.plan))], module.device)
    operations = []
    with eval_mode(module.student):
        for model in (teacher, module.student):
            with FlopCounterMode(display=False) as counter:
                logits(model, batch.inputs)  # type: ignore[arg-type]
            operations.append(counter.get_total_flops())
    return 1 + operations[0] / (3 * operations[1])
