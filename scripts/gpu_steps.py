"""Training steps on a GPU beside a bare loop of Hugging Face models; used by gpu_report.py.

Both train the same models on the same batches with the same loss: alpha * CE + (1 - alpha) * T^2 *
KL(teacher || student). The bare loop has autocast, sdpa attention, a fused AdamW and all logits at
once. `Scale.small` is for a CPU, to try the script itself.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from lightning.fabric.utilities import move_data_to_device
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from distill import data
from distill.module import Distillation
from distill.recipe import config
from distill.tasks import CausalLanguageModelling, SingleLabelClassification, Task
from distill.tasks.labels import Labels
from distill.training import Training, loop

ALPHA, TEMPERATURE = 0.3, 2.0
ENDLESS = 100_000  # steps of a schedule that does not end while it is measured
CLASSES = 5
LOGGED = 10  # steps from one logged step to the next, as `loop.py` sets it


class Job(NamedTuple):
    """Models and encoded examples.

    Args:
        make_student: Builds the student on the current device.
        teacher: The online teacher; None if the examples hold its logits.
        tokens: Tokens of a batch.
    """

    task: Task
    examples: Dataset
    make_student: Callable[[], Any]
    teacher: Any
    batch_size: int
    tokens: int
    device: str

    def model_flops(self, student: Any) -> float:
        """Of a step: 6 per parameter of the student and 2 of the teacher, without embeddings."""
        parameters = 6 * student.num_parameters(exclude_embeddings=True)
        if self.teacher is not None:
            parameters += 2 * self.teacher.num_parameters(exclude_embeddings=True)
        return parameters * self.tokens


class Measured(NamedTuple):
    milliseconds: float  # of a step, median
    peak_gb: float  # memory of the GPU; NaN on a CPU


def small_bert(device: str, small: bool) -> Job:
    """BERT of 3 layers with a cached teacher, 32 examples of 32 tokens."""
    generator, rows, length = np.random.default_rng(0), 2048, 32
    columns = {
        "input_ids": generator.integers(5, 900, (rows, length)).tolist(),
        "labels": generator.integers(0, CLASSES, rows).tolist(),
        "teacher_logits": generator.normal(size=(rows, 1, CLASSES)).tolist(),
        "size": [1] * rows,
        "length": [length] * rows,
        "rows": [1] * rows,
    }
    integer = Value("int64")
    features = Features(
        dict.fromkeys(("labels", "size", "length", "rows"), integer)
        | {"input_ids": List(integer), "teacher_logits": List(List(Value("float32")))}
    )
    width = 64 if small else 384
    settings: Any = BertConfig(  # type: ignore[call-arg]
        vocab_size=30522, hidden_size=width, num_hidden_layers=3, intermediate_size=4 * width,
        num_attention_heads=width // 32, num_labels=CLASSES, attn_implementation="sdpa",
    )  # fmt: skip

    def make_student() -> Any:
        with torch.device(device):
            return AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)

    task = SingleLabelClassification(length).with_labels(Labels(names=tuple("abcde")))
    examples = Dataset.from_dict(columns, features=features)
    return Job(task, examples, make_student, None, 32, 32 * length, device)


def llama(device: str, small: bool) -> Job:
    """22 layers of 2048 (1.1 B parameters) online in bfloat16, half of them in the student."""
    vocabulary, length, batch = (300, 32, 8) if small else (7500, 1024, 8)
    generator, rows = np.random.default_rng(0), 60 * batch
    ids = generator.integers(5, vocabulary, (rows, length)).tolist()
    columns = {
        "input_ids": ids,
        "labels": [[-100, *row[1:]] for row in ids],
        "size": [4 * length] * rows,
        "length": [length] * rows,
        "rows": [length - 1] * rows,
    }

    def make(layers: int, dtype: torch.dtype) -> Any:
        settings: Any = LlamaConfig(  # type: ignore[call-arg]
            vocab_size=vocabulary, hidden_size=64 if small else 2048,
            intermediate_size=128 if small else 5632,
            num_hidden_layers=layers // 8 + 1 if small else layers,
            num_attention_heads=4 if small else 32, num_key_value_heads=2 if small else 4,
            max_position_embeddings=2048, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(device):
            return AutoModelForCausalLM.from_config(settings, dtype=dtype)

    teacher = make(22, torch.bfloat16).eval().requires_grad_(False)
    task, examples = CausalLanguageModelling(length), Dataset.from_dict(columns)
    student = lambda: make(11, torch.float32)  # noqa: E731
    return Job(task, examples, student, teacher, batch, batch * length, device)


class _Enough(BaseException):
    """Ends a training that has been measured."""


class _Window(L.Callback):
    """Milliseconds of the steps after the warm-up; then calls a function with the steps' number."""

    def __init__(self, job: Job, warm: int, steps: int, after: Callable[[int], None]) -> None:
        self.job, self.warm, self.end, self.after = job, warm, warm + steps, after
        self.began = self.milliseconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self.warm:
            self.began = now(self.job.device)
        if step == self.end:
            elapsed = now(self.job.device) - self.began
            self.milliseconds = 1e3 * elapsed / (self.end - self.warm)
        if step >= self.end:
            self.after(step - self.end)


def now(device: str) -> float:
    """The time in seconds, after the work that is queued on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def stop(_: int) -> None:
    """End the training after the window."""
    raise _Enough


def ours(
    job: Job, warm: int, steps: int, after: Callable[[int], None] = stop, **trainer: Any
) -> Measured:
    """A step of the student stage, with logging and callbacks, without validations."""
    accelerator = "gpu" if job.device == "cuda" else "cpu"
    fixed = {"max_steps": ENDLESS, "validations": 1, "progress": False}
    settings = config.Trainer(
        **(fixed | {"precision": "bf16-mixed", "accelerator": accelerator} | trainer)
    )
    loss = config.Loss(alpha=ALPHA, temperature=TEMPERATURE)
    optimizer = config.Optimizer(lr=1e-4)
    module = Distillation(job.task, job.make_student(), job.teacher, loss, optimizer, ENDLESS)
    train = data.make_loader(job.examples, job.task, 0, data.Batching(job.batch_size, 1, 0))
    validation = data.make_loader(job.examples, job.task, 0, data.Batching(job.batch_size))
    window = _Window(job, warm, steps, after)
    with PeakMemory(job.device) as peak, TemporaryDirectory() as folder, suppress(_Enough):
        loop.fit(Training(module, train, validation, settings, Path(folder), [], [window]))
    if job.teacher is not None:
        job.teacher.to(job.device)
    return Measured(window.milliseconds, peak.gb)


def bare(job: Job, warm: int, steps: int) -> Measured:
    """A step of a loop in plain PyTorch."""
    torch.use_deterministic_algorithms(False)
    with PeakMemory(job.device) as peak:
        student = job.make_student().train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        for number, batch in enumerate(islice(_batches(job), warm + steps)):
            if number == warm:
                began = now(job.device)
            loss = _bare_loss(job, student, move_data_to_device(batch, job.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return Measured(1e3 * (now(job.device) - began) / steps, peak.read())


def _batches(job: Job) -> Iterator[Any]:
    loaders = (
        data.make_loader(job.examples, job.task, 0, data.Batching(job.batch_size, 1, epoch))
        for epoch in count()
    )
    return chain.from_iterable(loaders)


def _bare_loss(job: Job, student: Any, batch: Any) -> torch.Tensor:
    with torch.autocast(job.device, torch.bfloat16):
        logits = job.task.select_rows(student(**batch.inputs).logits, batch).float()
    teacher = batch.teacher
    if teacher is None:
        with torch.no_grad():
            teacher = job.task.select_rows(job.teacher(**batch.inputs).logits, batch)
    student_NC = F.log_softmax(logits / TEMPERATURE, -1)
    teacher_NC = F.log_softmax(teacher.float() / TEMPERATURE, -1)
    divergence = F.kl_div(student_NC, teacher_NC, log_target=True, reduction="sum")
    supervised = F.cross_entropy(logits, batch.labels, reduction="sum")
    total = ALPHA * supervised + (1 - ALPHA) * TEMPERATURE**2 * divergence
    return total / batch.rows


class PeakMemory:
    """Context that measures the peak of the GPU's memory in GB."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.gb = device == "cuda", float("nan")

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def read(self) -> float:
        self.gb = torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else self.gb
        return self.gb

    def __exit__(self, *_: Any) -> None:
        self.read()


def in_turns(ways: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, Measured]:
    """Medians over rounds in which each way is measured once."""
    results: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    return {
        name: Measured(*(statistics.median(values) for values in zip(*measured, strict=True)))
        for name, measured in results.items()
    }


def profile_step(job: Job, **trainer: Any) -> list[tuple[str, float, int]]:
    """The kernels of one step by their time: (name, milliseconds, calls), largest first."""
    activities = [ProfilerActivity.CPU]
    if job.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)

    def after(step: int) -> None:
        if step == 0:
            profiler.__enter__()
        if step == 1:
            now(job.device)
            profiler.__exit__(None, None, None)
            raise _Enough

    ours(job, 3, 2, after, **trainer)
    on_gpu = job.device == "cuda"
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        (event.key, getattr(event, key) / 1e3, event.count)
        for event in profiler.key_averages()
        if not on_gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    ]
    return sorted(rows, key=lambda row: -row[1])


def waits(job: Job, steps: int = LOGGED - 2) -> int:
    """CPU-GPU sync points in steps that are not logged."""

    def after(step: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if step == steps:
            raise _Enough
        torch.cuda.set_sync_debug_mode("warn")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours(job, LOGGED - 2, 2, after)  # it starts after a logged step, which reads losses
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
