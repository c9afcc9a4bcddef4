"""Compilation of a step, and the time that an online teacher adds to a training step."""

import logging
import math
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
from transformers import PreTrainedModel

from distill import internals
from distill.models import batch_inputs, blocks, forward_arguments, logits
from distill.module import Distillation, eval_mode
from distill.tasks.batch import Batch
from distill.training import throughput

log = logging.getLogger(__name__)

WARM_UP = 20  # micro-batches after which nothing is compiled any more; none of them is timed
TIMED = 200  # micro-batches that are timed at most


class CompileStep(Callback):
    """Compiles a step as one graph, or else the transformer blocks of both models.

    Blocks are compiled in place, which keeps their names and tensors.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._start = 0.0
        self._blocks: list[nn.Module] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        for model in module.models():
            forward_arguments(model)  # a compiler cannot follow the inspection of a signature
        if not module.compile_step():
            models = [model for model in module.models() if isinstance(model, PreTrainedModel)]
            self._blocks = [block for model in models for block in blocks(model)]
        for block in self._blocks:
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
        for block in self._blocks:
            internals.undo_compile(block)

    def _log_cost(self) -> None:
        count = len(self._seconds)
        seconds = sum(self._seconds) - count * statistics.median(self._seconds)
        log.info("compiling a step took %.0f s of its first %d batches", seconds, count)


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
        forwards: the student's step in forwards of the student.
        measured: the measured factor, NaN if there were too few steps.
    """

    def __init__(self) -> None:
        self.bound = self.measured = self.forwards = float("nan")
        self._timer: DeviceTimer | None = None
        self._hooks: list[Any] = []
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        self.forwards = forwards_of_a_step(module.student)
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
            "by arithmetic 1 + F_T / (%.2g F_S) = %s",
            factor,
            self.forwards,
            "unknown" if math.isnan(self.bound) else f"{self.bound:.2f}",
        )


def step_cost_bound(module: Distillation, teacher: nn.Module, loader: Any) -> float:
    """1 + F_T / (3 F_S): a backward costs two forwards, so a student's step costs three.

    Beside frozen weights a backward costs little more than one, see :func:`forwards_of_a_step`.

    Args:
        module: the module with the student.
        teacher: runs one forward in each step.
        loader: its first batch is run through both models.

    Returns:
        The factor by which the teacher lengthens a step, from the operations of one forward of
        teacher (F_T) and student (F_S); NaN if they are unknown.
    """
    batch: Batch = move_data_to_device(loader.first_batch(), module.device)
    with eval_mode(module.student):
        flops = [
            forward_flops(model, read)
            for model, read in ((teacher, batch.for_teacher()), (module.student, batch))
        ]
    return 1 + flops[0] / (forwards_of_a_step(module.student) * flops[1])


def forwards_of_a_step(student: Any) -> float:
    """The operations of a forward and backward of the student, in forwards: 3 if all is trained."""
    return throughput.training_flops(student, None) / throughput.forward_flops(student)


@torch.no_grad()
def forward_flops(model: Any, batch: Batch) -> float:
    """Floating point operations of a forward, NaN if torch cannot count them."""
    formulas = dict.fromkeys(internals.attention_operators(), attention_flops)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    try:
        with counter, batch_inputs(model, batch) as inputs:
            logits(model, inputs)
        return counter.get_total_flops() or math.nan
    except Exception as error:  # noqa: BLE001 (formulas assert, and nothing depends on the count)
        log.debug("the operations of %s are unknown: %r", type(model).__name__, error)
        return math.nan


def attention_flops(query_BHLD: Any, key_BGSD: Any, value_BGSE: Any, *_: Any, **__: Any) -> int:
    """Operations of attention over shapes: two products for each of the H heads of the queries.

    torch 2.11 refuses G < H, grouped keys; no version counts the attention of CPUs.
    """
    batch, heads, queries, width = query_BHLD
    return 2 * batch * heads * queries * key_BGSD[2] * (width + value_BGSE[3])
