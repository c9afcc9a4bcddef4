"""module and batches -> trained module: the Lightning Trainer as this project sets it up, for teacher and student alike."""

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from datasets import Dataset
from torch.utils.data import DataLoader

from distill import config, data
from distill.module import Distillation
from distill.tasks.base import Task

log = logging.getLogger(__name__)


def steps(trainer: config.Trainer, loader: DataLoader, epochs: float | None = None) -> int:
    """Optimizer steps of a training: `max_steps`, or that many epochs of the loader's batches."""
    per_epoch = loader.sampler.steps  # type: ignore[union-attr]
    return trainer.max_steps if trainer.max_steps is not None and epochs is None else math.ceil((epochs or trainer.epochs) * per_epoch)


def precision(trainer: config.Trainer) -> str:
    """`auto` -> bf16-mixed where the device has units for it, else 32-true."""
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def loaders(run: config.Run, train: Dataset, validation: Dataset, task: Task, pad_id: int) -> tuple[DataLoader, DataLoader]:
    """Training batches in an order fixed by (seed, epoch), and validation batches, as the recipe asks for them."""
    settings = run.data
    return (
        data.loader(train, task, pad_id, settings.batch_size, run.trainer.accumulate, run.seed, settings.group_by_length, settings.workers),
        data.loader(validation, task, pad_id, run.evaluate.batch_size),
    )


def fit(
    module: Distillation, train: DataLoader, validation: DataLoader, settings: config.Trainer, folder: Path, loggers: list[Any], callbacks: list[Callback]
) -> dict[str, float]:
    """Train, and leave the module with the weights that did best on the validation split. Returns that checkpoint's metrics."""
    metric, mode = f"val/{module.task.primary}", "max" if module.task.maximise else "min"
    best = ModelCheckpoint(folder, filename="best", monitor=metric, mode=mode, save_top_k=1, enable_version_counter=False)
    last = ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)
    ours: list[Callback] = [LookAtTheEnd(module.steps), Narrator(metric), best, last]
    if settings.patience is not None:
        ours.append(EarlyStopping(metric, mode=mode, patience=settings.patience))
    if bar := settings.progress and sys.stdout.isatty():
        ours.append(Bar(leave=False))
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=precision(settings),  # type: ignore[arg-type]
        max_steps=module.steps,
        max_epochs=math.ceil(module.steps / train.sampler.steps),  # type: ignore[union-attr]
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=max(1, module.steps // settings.validations) * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn",
        log_every_n_steps=max(1, min(10, module.steps // 20)),
        logger=loggers,
        callbacks=[*callbacks, *ours],  # the user's own come first: a checkpoint holds what they did
        enable_progress_bar=bar,
        enable_model_summary=False,
    )
    with quiet(), as_interrupt(trainer):
        trainer.fit(module, train, validation)
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    module.eval()
    return {metric: float(best.best_model_score), "step": checkpoint["global_step"]}  # type: ignore[arg-type]


class LookAtTheEnd(Callback):
    """Makes the last step a look at the validation split, whatever the interval."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class Narrator(Callback):
    """One log line per look at the validation split: what a terminal without a progress bar, and train.log, show."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = trainer.callback_metrics
        log.info("step %d of %d: loss %.4f, %s %.4f", trainer.global_step, trainer.max_steps, values["train/loss"], self.metric, values[self.metric])


class Bar(RichProgressBar):
    """Lightning's progress bar, without the version of its logger."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*arguments).items() if name != "v_num"}


class quiet(warnings.catch_warnings):  # noqa: N801 - reads as a verb where it is used
    """Keeps Lightning's advice about things decided here out of the terminal."""

    def __enter__(self) -> Any:
        caught = super().__enter__()
        for pattern in (".*does not have many workers.*", ".*in eval mode.*", ".*exists and is not empty.*", ".*deterministic.*", ".*tensorboard.*", ".*treespec.*"):
            warnings.filterwarnings("ignore", pattern)
        return caught


class as_interrupt:  # noqa: N801
    """Lightning answers Ctrl-C with `sys.exit`; this hands the KeyboardInterrupt on, so that the run can say what is kept."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is SystemExit and self.trainer.interrupted:
            raise KeyboardInterrupt
