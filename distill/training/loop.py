"""Trains a module, and loads the weights with the best validation metric.

Configures Lightning's Trainer, for teacher and student alike.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback

from distill import data, internals, store
from distill.data import Loader, StreamLoader
from distill.errors import RunFailed, UserError
from distill.models import adapters, packed_attention
from distill.models.hub import first_sentences
from distill.module import Distillation
from distill.processes import ranks, signals, strategy
from distill.processes.memory import keep_freed_memory
from distill.recipe import config
from distill.stages import show_progress
from distill.tasks.base import Task
from distill.training import checkpoint_files, performance
from distill.training.batching import evaluation_batching, training_batching
from distill.training.checkpoint_writer import AtomicCheckpointIO
from distill.training.checkpoints import CheckpointSaver, PerBatchSeed
from distill.training.hardware import resolve_precision
from distill.training.loggers import CsvLogger
from distill.training.progress import (
    ConsoleLogger,
    ProgressBar,
    reraise_interrupt,
    silence_lightning,
)
from distill.training.throughput import Throughput
from distill.training.validation_runs import (
    BestCheckpoint,
    PatientEarlyStopping,
    ValidationSchedule,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """One training, of a teacher or of a student.

    Args:
        module: the module to train; `module.steps` is the length.
        train: micro-batches of the training split.
        validation: batches of the validation split.
        settings: the recipe's section `trainer`.
        folder: folder of its checkpoints, from which it resumes.
        loggers: Lightning loggers.
        callbacks: Lightning callbacks, in their order.
        rate_key: the learning rate's key in the recipe, for the error if training diverges.
    """

    module: Distillation
    train: Loader | StreamLoader
    validation: Loader
    settings: config.Trainer
    folder: Path
    loggers: list[Any] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    rate_key: str = "optimizer.lr"


def fit(training: Training) -> dict[str, float]:
    """Train, and load the weights with the best validation metric into the module.

    Returns:
        The best value of the task's primary metric by its name, and its `step`.

    Raises:
        RunFailed: if no validation run had finite weights.
    """
    module, settings = training.module, training.settings
    module.rate_key = training.rate_key
    best = BestCheckpoint(f"val/{module.task.primary_metric}", module.task.maximize)
    start = _resume_point(training)
    with silence_lightning(), signals.defer_stop_signals() as requests:
        saver = CheckpointSaver(training.folder, settings.checkpoint, module.steps, best, requests)
        trainer = _build_trainer(
            training,
            [
                PerBatchSeed(training.train.plan.batching.seed or 0),
                saver,
                *training.callbacks,  # before the observers of their effects
                *_observers(training, best),
                *([performance.CompileStep()] if settings.compile else []),
            ],
        )
        packing = training.train.plan.batching.packing
        attention = packed_attention(*module.models()) if packing else nullcontext()
        with (
            _explain_load(start, saver),
            reraise_interrupt(trainer),
            keep_freed_memory(),
            attention,
        ):
            trainer.fit(
                module, training.train, training.validation, ckpt_path=start, weights_only=True
            )
    return {best.metric: best.score, "step": _load_best(training, best)}


def _resume_point(training: Training) -> Path | None:
    """The checkpoint to resume from, if any; rows that will be logged again are dropped."""
    start = ranks.run_on_rank_zero(lambda: checkpoint_files.newest_intact(training.folder))
    if start is not None:
        log.info("resuming from %s", start)
    step = checkpoint_files.step_of(start) if start is not None else 0
    for logger in training.loggers:
        if isinstance(logger, CsvLogger):
            logger.drop_from_step(step)
    return start


@contextmanager
def _explain_load(start: Path | None, saver: CheckpointSaver) -> Iterator[None]:
    """Turn an error in loading a checkpoint into a UserError; a lack of memory is none of it."""
    try:
        yield
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if start is None or saver.started:
            raise
        raise UserError(
            f"{start} is a checkpoint of another training ({first_sentences(str(error))}), but a "
            "run continues its own: delete it, and the one before it is used"
        ) from error


def _observers(training: Training, best: BestCheckpoint) -> list[Callback]:
    """The callbacks that run validation and act on its metrics."""
    settings, steps = training.settings, training.module.steps
    throughput = Throughput()
    observers = [
        ValidationSchedule(steps, settings.validations),
        throughput,
        ConsoleLogger(best.metric, throughput),
        best,
    ]
    if settings.patience is not None:
        mode = "max" if best.maximize else "min"
        observers.append(
            PatientEarlyStopping(steps, monitor=best.metric, mode=mode, patience=settings.patience)
        )
    if show_progress(settings.progress):
        observers.append(ProgressBar(leave=False, refresh_rate=2))
    return observers


def _build_trainer(training: Training, callbacks: list[Callback]) -> L.Trainer:
    settings, steps = training.settings, training.module.steps
    # `deterministic` would first fill all new memory with NaN, which takes 4 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not settings.deterministic:
        log.info(
            "a training that resumes may end with other weights: trainer.deterministic is false"
        )
    trainer = L.Trainer(
        **strategy.lightning_strategy(settings),
        precision=resolve_precision(settings),  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=math.ceil(steps / training.train.plan.steps),
        accumulate_grad_batches=settings.accumulate,
        # ValidationSchedule changes it: a resumed training starts where a validation run ended.
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn" if settings.deterministic else False,
        log_every_n_steps=max(1, min(10, steps // 20)),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(settings.checkpoint.keep)],
        logger=training.loggers,
        callbacks=callbacks,
    )
    internals.disable_signal_handlers(trainer)
    return trainer


def _load_best(training: Training, best: BestCheckpoint) -> int:
    """Load the weights with the best metric into the student, and return their step."""
    module, folder = training.module, training.folder
    ranks.barrier()  # the first has written the last checkpoint
    state = _state_dict(folder, best.step)
    if (
        best.step is None
        or not state
        or not all(tensor.isfinite().all() for tensor in state.values())
    ):
        key = training.rate_key
        raise RunFailed(
            f"{key} is {module.settings.lr:g}, but with it the training diverged and left no "
            f"finite weights: lower {key}"
        )
    prefix = "student."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    module.student.load_state_dict(adapters.base_state(module.student) | weights)
    module.eval()
    if ranks.is_rank_zero():
        store.link_file(checkpoint_files.checkpoint_path(folder, best.step), folder / "best.ckpt")
        store.link_file(checkpoint_files.newest(folder), folder / "last.ckpt")
    return best.step


def _state_dict(folder: Path, step: int | None) -> dict[str, torch.Tensor]:
    """The state dict of a step's checkpoint, mapped into memory; empty without a step."""
    if step is None:
        return {}
    file = checkpoint_files.checkpoint_path(folder, step)
    # What is not used, the optimizer's state above all, is not read.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def count_steps(trainer: config.Trainer, steps_per_epoch: int, epochs: float | None = None) -> int:
    """Optimizer steps of a training.

    Args:
        trainer: `max_steps` overrides `epochs`.
        steps_per_epoch: optimizer steps of one epoch.
        epochs: replaces the trainer's `max_steps` and `epochs`.
    """
    if trainer.max_steps is not None and epochs is None:
        return trainer.max_steps
    return math.ceil((epochs or trainer.epochs) * steps_per_epoch)


def make_loaders(
    run: config.Run,
    train: Dataset,
    validation: Dataset,
    task: Task,
    pad_id: int,
    teacher_pad_id: int | None = None,
) -> tuple[Loader, Loader]:
    """Training batches, in an order drawn from seed and epoch, and validation batches."""
    batching = training_batching(run.data, run.trainer, task.max_length, run.seed)
    evaluated = evaluation_batching(run.evaluate.batch_size, run.trainer)
    return (
        data.make_loader(train, task, pad_id, batching, run.data.workers, teacher_pad_id),
        data.make_loader(validation, task, pad_id, evaluated),
    )
