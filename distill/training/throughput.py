"""Tokens per second, model FLOPs utilization and peak memory of a training."""

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.adapters import BaseTeacher
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
    """Operations of a step per token: 2 for each weight that a forward multiplies with.

    The student's backward takes as many for the gradients of activations, and again for those of
    the weights that are trained. What gradient checkpointing computes again does not count.

    Args:
        student: the model that is trained.
        teacher: the model that runs a forward in each step, which may be the student itself.
    """
    flops = sum((4 + 2 * each.requires_grad) * each.numel() for each in _matrices(student))
    return flops + (0 if teacher is None else forward_flops(teacher))


def forward_flops(model: Any) -> int:
    """Operations of a forward per token, without those of attention over other tokens."""
    return sum(2 * each.numel() for each in _matrices(model))


def _matrices(model: Any) -> list[Tensor]:
    """The weights that a forward multiplies with. Embeddings are looked up, but by a tied head."""
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    matrices = [each for each in model.parameters() if each.ndim > 1 and id(each) not in tables]
    head = model.get_output_embeddings()
    return matrices if head is None or id(head.weight) not in tables else [*matrices, head.weight]


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
        teachers = [student if isinstance(each, BaseTeacher) else each for each in teachers]
        online = next((each for each in teachers if isinstance(each, PreTrainedModel)), None)
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
