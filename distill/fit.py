"""module and batches -> trained module: the Lightning Trainer as this project sets it up, for teacher and student alike."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar

from distill import config, data
from distill.callbacks.base import compressions
from distill.data import Loader
from distill.errors import RunFailed, UserError
from distill.module import Distillation
from distill.stages import watched
from distill.tasks.base import Task

log = logging.getLogger(__name__)


def steps(trainer: config.Trainer, per_epoch: int, epochs: float | None = None) -> int:
    """Optimizer steps of a training: `max_steps`, or that many epochs of so many steps."""
    return trainer.max_steps if trainer.max_steps is not None and epochs is None else math.ceil((epochs or trainer.epochs) * per_epoch)


def check_device(trainer: config.Trainer) -> None:
    """UserError where the recipe asks for a GPU that is not there."""
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator is gpu, but no GPU can be used here: set trainer.accelerator=auto, or check its driver")


def precision(trainer: config.Trainer) -> str:
    """`auto` -> bf16-mixed where the device has units for it, else 32-true."""
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def loaders(run: config.Run, train: Dataset, validation: Dataset, task: Task, pad_id: int) -> tuple[Loader, Loader]:
    """Training batches in an order fixed by (seed, epoch), and validation batches, as the recipe asks for them."""
    settings = run.data
    return (
        data.loader(train, task, pad_id, settings.batch_size, run.trainer.accumulate, run.seed, settings.group_by_length, settings.workers),
        data.loader(validation, task, pad_id, run.evaluate.batch_size),
    )


def fit(
    module: Distillation,
    train: Loader,
    validation: Loader,
    settings: config.Trainer,
    folder: Path,
    loggers: list[Any],
    callbacks: list[Callback],
    rate: str = "optimizer.lr",
) -> dict[str, float]:
    """Train, and leave the module with the weights that did best on the validation split. Returns that checkpoint's metrics.

    `rate` is the recipe's key of the learning rate, to be named should the training diverge.
    """
    metric, mode = f"val/{module.task.primary}", "max" if module.task.maximise else "min"
    best = Best(folder, filename="best", monitor=metric, mode=mode, save_top_k=1, enable_version_counter=False)
    last = ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)
    ours = [LookAtTheEnd(module.steps), Narrator(metric), best, last]
    if settings.patience is not None:
        ours.append(Patience(metric, mode=mode, patience=settings.patience))
    if watched(settings.progress):
        ours.append(Bar(leave=False))
    with quiet():
        # the user's callbacks come first: a checkpoint holds what they did
        trainer = _trainer(settings, module.steps, train, logger=loggers, callbacks=[*callbacks, *ours])
        with as_interrupt(trainer):
            trainer.fit(module, train, validation)
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True) if best.best_model_path else None
    if checkpoint is None or not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        raise RunFailed(f"{rate} is {module.settings.lr:g}, but with it the training diverged and left no finite weights: lower {rate}")
    module.load_state_dict(checkpoint["state_dict"])
    module.eval()
    return {metric: float(best.best_model_score), "step": checkpoint["global_step"]}  # type: ignore[arg-type]


def _trainer(settings: config.Trainer, steps: int, train: Loader, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=precision(settings),  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=math.ceil(steps / train.plan.steps),
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=math.ceil(steps / settings.validations) * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn",
        log_every_n_steps=max(1, min(10, steps // 20)),
        enable_progress_bar=any(isinstance(callback, Bar) for callback in options["callbacks"]),
        enable_model_summary=False,
        **options,
    )


class InFinalForm(Callback):
    """Counts only the looks at the validation split after which no technique will change the student any more."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if all(technique.reached == 1 for technique in compressions(trainer.callbacks)):  # type: ignore[attr-defined]
            super().on_validation_end(trainer, module)


class Best(InFinalForm, ModelCheckpoint):
    """The checkpoint that did best on the validation split."""


class Patience(InFinalForm, EarlyStopping):
    """Stops where the validation split shows no improvement."""


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
        loss, score = (float(trainer.callback_metrics[name]) for name in ("train/loss", self.metric))
        said = f"step {trainer.global_step} of {trainer.max_steps}: loss {loss:.4f}, {self.metric} {score:.4f}"
        bar = trainer.progress_bar_callback
        if isinstance(bar, Bar):
            bar.say(said)
            log.debug(said)  # for train.log
        else:
            log.info(said)


class Bar(RichProgressBar):
    """Lightning's progress bar, without the version of its logger."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*arguments).items() if name != "v_num"}

    def say(self, line: str) -> None:
        """Print above the bar, which would otherwise be written over."""
        if self.progress is not None:
            self.progress.console.print(line, highlight=False)


ADVICE = (
    ".*does not have many workers.*",
    ".*in eval mode.*",
    ".*exists and is not empty.*",
    ".*deterministic.*",
    ".*treespec.*",
    ".*smaller than the logging interval.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's advice about what is decided here out of the terminal."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for pattern in ADVICE:
            warnings.filterwarnings("ignore", pattern)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def as_interrupt(trainer: L.Trainer) -> Iterator[None]:
    """Lightning answers Ctrl-C with `sys.exit`; this hands the KeyboardInterrupt on, so that the run can say what is kept."""
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt if trainer.interrupted else ended from None
