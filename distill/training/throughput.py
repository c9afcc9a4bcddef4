"""Tokens per second, model FLOPs utilization and peak memory of a training."""

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from distill.module import Distillation
from distill.processes import ranks
from distill.tasks.batch import Batch

# Dense bfloat16 operations per second by the name of a GPU, from data sheets; longer names first.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str) -> float | None:
    """The card's operations per second in bfloat16, None if they are not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def training_flops(student: Any, teacher: Any | None) -> int:
    """Operations of a step per token: 6 for a student's parameter, 2 for a teacher's.

    Embeddings are looked up and do not count.
    """
    flops = 6 * student.num_parameters(exclude_embeddings=True)
    return flops + (0 if teacher is None else 2 * teacher.num_parameters(exclude_embeddings=True))


class Throughput(Callback):
    """Measures the speed between logged steps, where the host has just waited for the device.

    Validation runs and checkpoints do not count.

    Attributes:
        tokens_per_second: Tokens of all ranks without padding, NaN before it is measured.
    """

    def __init__(self) -> None:
        self.tokens_per_second = math.nan
        self._flops = 0
        self._peak: float | None = None
        self._tokens, self._start, self._step = 0.0, math.nan, 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        student, *teachers = module.models()
        online = next((each for each in teachers if hasattr(each, "num_parameters")), None)
        self._flops, self._step = training_flops(student, online), trainer.global_step
        if module.device.type == "cuda" and trainer.precision != "32-true":
            self._peak = peak_flops(torch.cuda.get_device_name(module.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, index: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._tokens += batch.tokens if math.isfinite(batch.tokens) else 0
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            if self._tokens and not math.isnan(self._start):
                self.tokens_per_second = self._tokens / (time.perf_counter() - self._start)
            self._tokens, self._start = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Leave out the time up to the next logged step."""
        self._tokens, self._start = 0.0, math.nan

    def on_validation_start(self, *_: Any) -> None:
        self.pause()

    def on_save_checkpoint(self, *_: Any) -> None:
        self.pause()

    def describe(self) -> str:
        """The speed so far for a log line, empty before it is measured."""
        if math.isnan(self.tokens_per_second):
            return ""
        parts = [f"{self.tokens_per_second:,.0f} tokens/s"]
        if self._peak is not None:
            utilization = self.tokens_per_second * self._flops / self._peak / ranks.world_size()
            parts.append(f"{utilization:.0%} of the GPU's FLOPs")
        if torch.cuda.is_initialized():
            parts.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
        return ", ".join(parts)
