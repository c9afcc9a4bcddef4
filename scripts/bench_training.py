"""Seconds per example of a training step: cached teacher, online teacher, no teacher, and a bare
loop.

    python scripts/bench_training.py [recipe=bert_to_distil] [steps=25] [rounds=5] [compile=0]
                                     [peak=0] [key=value ...]

All variants run interleaved in one process, each for `steps` optimizer steps after 3 that do not
count; ratios are of medians. Ours is the student stage with logging, callbacks, metrics.csv and a
progress bar, without validation runs and checkpoints. The bare loop computes the same loss on the
same batches in plain PyTorch, and keeps freed memory too. Fine-tuning without a teacher trains on
the labels that the recipe hides. Filling the cache is compared with the teacher's forward over the
same, already collated batches. Seconds are process time of one thread on a CPU and wall time on a
GPU, where peak memory and model FLOPs utilization are shown as well (`peak`: TFLOPS of the device
in bf16). `compile=1` adds trainer.compile and the time that compiling takes.
"""

import os
import pty
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from benchmark import compose_run, conditions, interleave, options, seconds, table
from lightning.fabric.utilities import move_data_to_device
from torch.nn import functional as F
from transformers import get_scheduler

from distill import data, models, student, teacher
from distill.prepare import Prepared, prepare_run
from distill.processes.memory import keep_freed_memory
from distill.recipe import config
from distill.training import loop, performance
from distill.training.loggers import Tracker

WARMUP_STEPS = 3  # not timed
ROWS = (  # title, variant, what it is compared with, goal of the ratio
    ("plain fine-tuning", "plain", "plain", ""),
    ("cached teacher", "cached", "plain", "<= 1.02"),
    ("online teacher", "online", "plain", "<= {bound:.2f} = 1 + F_T / (3 F_S)"),
    ("bare PyTorch loop, cached teacher", "bare", "bare", ""),
    ("ours, cached teacher", "cached", "bare", "<= 1.03"),
    ("ours, trainer.compile", "compiled", "cached", ""),
    ("teacher's forward alone", "forward", "forward", ""),
    ("filling the cache", "filled", "forward", "1"),
)


class StepTimer(L.Callback):
    """Seconds of the warm-up steps and of the timed steps after them."""

    def __init__(self, steps: int, device: str) -> None:
        self.last, self.device = WARMUP_STEPS + steps, device
        self.began = self.start = self.seconds = 0.0

    @property
    def warmup_seconds(self) -> float:
        return self.start - self.began

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.began = seconds(self.device)
        if trainer.global_step == WARMUP_STEPS and not self.start:
            self.start = seconds(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.last:
            self.seconds = seconds(self.device) - self.start


class Bench:
    """Models and examples of a run; each public method returns seconds per example."""

    def __init__(self, run: config.Run, folder: Path, steps: int, device: str) -> None:
        self.run, self.folder, self.steps, self.device = run, folder, steps, device
        self.made = prepare_run(run)
        self.labelled = prepare_run(replace(run, data=replace(run.data, labelled=None)))
        self.teacher: Any = teacher.obtain(run, self.made, folder, Tracker(run, folder))
        self.cached_examples = self._with_outputs()
        self.warmup_seconds: dict[str, float] = {}

    def _with_outputs(self) -> Any:
        return teacher.with_outputs(self.run, self.made, self.teacher).examples["train"]

    def plain(self) -> float:
        run = replace(self.run, loss=replace(self.run.loss, alpha=1.0))
        return self._stage(run, self.labelled, self.labelled.examples["train"], "plain")

    def cached(self) -> float:
        return self._stage(self.run, self.made, self.cached_examples, "cached")

    def compiled(self) -> float:
        run = replace(self.run, trainer=replace(self.run.trainer, compile=True))
        return self._stage(run, self.made, self.cached_examples, "compiled")

    def online(self) -> float:
        assert self.run.teacher is not None
        run = replace(self.run, teacher=replace(self.run.teacher, outputs="online"))
        return self._stage(run, self.made, self.made.examples["train"], "online")

    def _stage(self, run: config.Run, made: Prepared, train: Any, name: str) -> float:
        """Seconds per example of our student stage."""
        steps = WARMUP_STEPS + self.steps
        trainer = replace(run.trainer, max_steps=steps, validations=1, progress=True)
        run = replace(run, trainer=trainer)
        timer = StepTimer(self.steps, self.device)
        examples = type(made.examples)(made.examples | {"train": train})
        model = None if self.teacher is None else self.teacher.float()
        with tempfile.TemporaryDirectory(dir=self.folder) as inside, stdout_on_a_terminal():
            folder = Path(inside)
            prepared = replace(made, examples=examples)
            student.train_student(run, prepared, model, [timer], folder, Tracker(run, folder))
        self.warmup_seconds[name] = timer.warmup_seconds
        return timer.seconds / self.steps / run.data.batch_size

    def bare(self) -> float:
        """The same steps in plain PyTorch, without deterministic algorithms."""
        torch.use_deterministic_algorithms(False)
        run, made, steps = self.run, self.made, WARMUP_STEPS + self.steps
        model: Any
        model, _ = student.build_student(run.student, made, self.teacher.float())
        model.to(self.device).train()
        pad_id, validation = made.tokenizer.pad_token_id, made.examples["validation"]
        train, _ = loop.make_loaders(run, self.cached_examples, validation, made.task, pad_id)
        optimizer = self._optimizer(model)
        warmup = round(run.optimizer.warmup * steps)
        schedule = get_scheduler(run.optimizer.schedule, optimizer, warmup, steps)
        bf16 = run.trainer.precision == "bf16-mixed"
        with keep_freed_memory():
            for number, batch in enumerate(islice(epochs(train), steps)):
                if number == WARMUP_STEPS:
                    start = seconds(self.device)
                batch = move_data_to_device(batch, self.device)
                with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                    loss = self._loss(models.logits(model, batch.inputs), batch)
                loss.backward()
                limit = run.optimizer.clip or float("inf")
                torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            return (seconds(self.device) - start) / self.steps / run.data.batch_size

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.run.optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.run.optimizer.lr, fused=True)

    def _loss(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """alpha * CE + (1 - alpha) * T^2 * KL, means over the batch; unlabelled rows count as 0."""
        alpha, temperature = self.run.loss.alpha, self.run.loss.temperature
        student_NC = F.log_softmax(logits.float() / temperature, -1)
        teacher_NC = F.log_softmax(batch.teacher.float() / temperature, -1)
        divergence = F.kl_div(student_NC, teacher_NC, log_target=True, reduction="sum")
        supervised = F.cross_entropy(
            logits.float(), batch.labels, reduction="sum", ignore_index=-100
        )
        return (alpha * supervised + (1 - alpha) * temperature**2 * divergence) / batch.rows

    def filled(self) -> float:
        """Filling the teacher's cache in an empty store."""
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as store,
            patch.dict(os.environ, DISTILL_CACHE=store),
        ):
            start = seconds(self.device)
            self._with_outputs()
            return (seconds(self.device) - start) / len(self.made.examples["train"])

    @torch.inference_mode()
    def forward(self) -> float:
        """The teacher's forward alone."""
        dtype = models.resolve_teacher_dtype(self.run.teacher, self.run.trainer)
        model: Any = models.in_dtype(self.teacher, dtype, copies=True)
        model.to(self.device)
        train, pad_id = self.made.examples["train"], self.made.tokenizer.pad_token_id
        size = self.run.evaluate.batch_size
        batches = [
            move_data_to_device(batch, self.device)
            for batch in data.make_loader(train, self.made.task, pad_id, data.Batching(size))
        ]
        with keep_freed_memory():
            start = seconds(self.device)
            for batch in batches:
                models.logits(model, batch.inputs).float()
            return (seconds(self.device) - start) / len(train)

    def forward_flops(self) -> list[float]:
        """Floating point operations of a forward for one example: student, teacher."""
        made, pad_id = self.made, self.made.tokenizer.pad_token_id
        model, _ = student.build_student(self.run.student, made, self.teacher)
        loader = data.make_loader(self.cached_examples, made.task, pad_id, data.Batching(1))
        batch = next(iter(loader))
        return [performance.forward_flops(each.float(), batch) for each in (model, self.teacher)]

    def padding(self) -> float:
        """Share of an epoch's tokens that are padding."""
        size, seed = self.run.data.batch_size, self.run.seed
        return data.BatchPlan(self.cached_examples, data.Batching(size, seed=seed)).padding_share()


def epochs(train: Any) -> Iterator[Any]:
    """Batches without end, in the order of one epoch after another."""
    return chain.from_iterable(
        train for _ in iter(lambda: train.plan.set_epoch(train.plan.epoch + 1), 0)
    )


@contextmanager
def stdout_on_a_terminal() -> Iterator[None]:
    """Send stdout to a pseudo-terminal, so that progress bars are drawn, and discard it."""
    reading_end, writing_end = pty.openpty()
    threading.Thread(target=_discard, args=(reading_end,), daemon=True).start()
    with os.fdopen(writing_end, "w") as terminal, redirect_stdout(terminal):
        yield


def _discard(terminal: int) -> None:
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:  # the writing end is closed
        os.close(terminal)


@dataclass
class Results:
    """Median seconds per example, peak GPU memory in MB (none on a CPU), FLOPs of a forward."""

    medians: dict[str, float]
    peak_memory: dict[str, float]
    student_flops: float
    teacher_flops: float

    def rows(self, peak_tflops: float) -> list[list[str]]:
        bound = 1 + self.teacher_flops / (3 * self.student_flops)
        rows = []
        for title, name, other, goal in ROWS:
            if name not in self.medians:
                continue
            value = self.medians[name]
            ratio = f"{value / self.medians[other]:.3f}"
            rows.append([title, f"{1e3 * value:.2f}", ratio, goal.format(bound=bound)])
            if self.peak_memory:
                rows[-1] += [f"{self.peak_memory[name]:.0f}", self._utilization(name, peak_tflops)]
        return rows

    def _utilization(self, name: str, peak_tflops: float) -> str:
        """Model FLOPs utilization: a step is three forwards of the student."""
        if not peak_tflops or name in ("forward", "filled"):
            return ""
        return f"{3 * self.student_flops / self.medians[name] / peak_tflops / 1e12:.1%}"


def measure(bench: Bench, names: list[str], rounds: int) -> Results:
    peaks: dict[str, float] = {}
    ways = {name: with_peak_memory(name, getattr(bench, name), peaks) for name in names}
    return Results(interleave(ways, rounds), peaks, *bench.forward_flops())


def with_peak_memory(
    name: str, way: Callable[[], float], peaks: dict[str, float]
) -> Callable[[], float]:
    """The same function, which also stores the peak of the GPU's memory."""
    if not torch.cuda.is_available():
        return way

    def measured() -> float:
        torch.cuda.reset_peak_memory_stats()
        result = way()
        peaks[name] = torch.cuda.max_memory_allocated() / 1e6
        return result

    return measured


def main() -> None:
    settings, changes = options({"steps": 25, "rounds": 5, "compile": 0, "peak": 0.0})
    run = compose_run(changes)
    if run.trainer.accumulate > 1:
        sys.exit(
            f"trainer.accumulate is {run.trainer.accumulate}, but the bare loop does not split "
            "batches: set it to 1"
        )
    names = ["plain", "cached", "online", "bare", "forward", "filled"]
    names += ["compiled"] if settings["compile"] else []
    device = models.resolve_device(run.trainer)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(run, Path(folder), settings["steps"], device)
        show(bench, measure(bench, names, settings["rounds"]), settings)


def show(bench: Bench, results: Results, settings: dict[str, Any]) -> None:
    extra = ["peak memory, MB", "model FLOPs utilization"] if results.peak_memory else []
    rows = results.rows(settings["peak"])
    print(table(["", "ms an example", "ratio", "goal", *extra], rows))
    print(f"\n{bench.padding():.1%} of the tokens of an epoch are padding (goal: below 5 %).")
    if "compiled" in results.medians:
        compiled, eager = (bench.warmup_seconds[name] for name in ("compiled", "cached"))
        print(
            f"The first {WARMUP_STEPS} steps took {compiled:.0f} s compiled, {eager:.1f} s eager."
        )
    run, precision = bench.run, bench.run.trainer.precision
    dtype = models.resolve_teacher_dtype(run.teacher, run.trainer)
    rounds = f"{settings['rounds']} rounds of {settings['steps']} steps"
    print(f"Medians of {rounds}; {precision}, teacher in {dtype}.\n")
    print(conditions(bench.device))


if __name__ == "__main__":
    main()
