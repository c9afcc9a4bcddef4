"""Compilation of the student, and the time that an online teacher adds to a training step."""

import logging
import statistics
import time
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
from distill.tasks.batch import Batch

log = logging.getLogger(__name__)

WARM_UP = 20  # micro-batches after which nothing is compiled any more; none of them is timed
TIMED = 200  # micro-batches that are timed at most


class CompileBlocks(Callback):
    """Compiles the student's transformer blocks in place, which keeps their names and tensors."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        for block in blocks(module.student):
            block.compile()

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self._seconds) < WARM_UP:
            self._seconds.append(time.perf_counter() - self._start)
            if len(self._seconds) == WARM_UP:
                self._log_cost()

    def on_train_end(self, *_: Any) -> None:
        if 0 < len(self._seconds) < WARM_UP:
            self._log_cost()

    def _log_cost(self) -> None:
        count = len(self._seconds)
        seconds = sum(self._seconds) - count * statistics.median(self._seconds)
        log.info("compiling the student took %.0f s of its first %d batches", seconds, count)


class DeviceTimer:
    """Device timestamps: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.timestamps: list[Any] = []

    def mark(self) -> None:
        """Take a timestamp; a GPU takes it when the work queued so far is done."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.timestamps.append(event)
        else:
            self.timestamps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each timestamp to the next one."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self.timestamps)]
        return [end - begin for begin, end in pairwise(self.timestamps)]


class OnlineTeacherCost(Callback):
    """Measures and logs the factor by which the teacher's forward lengthens a step.

    Attributes:
        bound: the factor by arithmetic, see :func:`step_cost_bound`.
        measured: the measured factor, NaN if there were too few steps.
    """

    def __init__(self) -> None:
        self.bound = self.measured = float("nan")
        self._timer: DeviceTimer | None = None
        self._hooks: list[Any] = []
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        self.bound = step_cost_bound(module, module.teacher, trainer.train_dataloader)
        self._timer, self._batches = DeviceTimer(module.device), 0
        self._hooks = [
            module.teacher.register_forward_pre_hook(lambda *_: self._mark()),
            module.teacher.register_forward_hook(lambda *_: self._mark()),
        ]

    def _mark(self) -> None:
        if self._timer is not None and WARM_UP < self._batches <= WARM_UP + TIMED:
            self._timer.mark()

    def on_train_batch_start(self, *_: Any) -> None:
        self._batches += 1
        self._mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self._mark()

    def on_train_end(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        assert self._timer is not None
        # Intervals of each batch: before, in and after the teacher; then the time between batches.
        parts = self._timer.seconds()
        before, teacher, after = (sum(parts[first::4]) for first in range(3))
        factor = "? (too few steps to measure)"
        if teacher:
            self.measured = (before + teacher + after) / (before + after)
            factor = f"{self.measured:.2f}"
        log.info(
            "the online teacher makes a step %s times as long; "
            "by arithmetic 1 + F_T / (3 F_S) = %.2f",
            factor,
            self.bound,
        )


@torch.no_grad()
def step_cost_bound(module: Distillation, teacher: nn.Module, loader: Any) -> float:
    """1 + F_T / (3 F_S): a backward costs two forwards, so a student's step costs three.

    Args:
        module: the module with the student.
        teacher: runs one forward in each step.
        loader: its first micro-batch is run through both models.

    Returns:
        The factor by which the teacher lengthens a step, from the operations of one forward of
        teacher (F_T) and student (F_S).
    """
    batch: Batch = move_data_to_device(loader.dataset[next(iter(loader.plan))], module.device)
    flops = []
    with eval_mode(module.student):
        for model in (teacher, module.student):
            with FlopCounterMode(display=False) as counter:
                logits(model, batch.inputs)  # type: ignore[arg-type]
            flops.append(counter.get_total_flops())
    return 1 + flops[0] / (3 * flops[1])
