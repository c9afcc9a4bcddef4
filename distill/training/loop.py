"""module and batches -> trained module: the Lightning Trainer as this project sets it up, for teacher and student alike."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar

from distill import data, models, store
from distill.callbacks.base import compressions
from distill.data import Loader
from distill.errors import RunFailed, UserError
from distill.module import Distillation
from distill.processes import fsdp, ranks, signals
from distill.recipe import config
from distill.stages import show_progress
from distill.tasks.base import Task
from distill.training import checkpoints, performance
from distill.training.checkpoints import AtomicCheckpointIO, CheckpointSaver, PerBatchSeed
from distill.training.loggers import CsvLogger

log = logging.getLogger(__name__)

NEVER = 1 << 62  # batches


def count_steps(trainer: config.Trainer, per_epoch: int, epochs: float | None = None) -> int:
    """Optimizer steps of a training: `max_steps`, or that many epochs of so many steps."""
    return (
        trainer.max_steps
        if trainer.max_steps is not None and epochs is None
        else math.ceil((epochs or trainer.epochs) * per_epoch)
    )


def check_device(trainer: config.Trainer) -> None:
    """UserError where the recipe asks for a GPU that is not there."""
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator is gpu, but no GPU can be used here: set trainer.accelerator=auto, or check its driver"
        )


def resolve_precision(trainer: config.Trainer) -> str:
    """`auto` -> bf16-mixed where the device has units for it, else 32-true."""
    if trainer.precision != "auto":
        return trainer.precision
    return "bf16-mixed" if models.supports_bf16(trainer) else "32-true"


def resolve_auto(run: config.Run) -> config.Run:
    """The run with `auto` replaced by what it means on this device: it may go on where auto means another thing."""
    tutor = run.teacher and replace(run.teacher, dtype=models.resolve_teacher_dtype(run))
    return replace(
        run, teacher=tutor, trainer=replace(run.trainer, precision=resolve_precision(run.trainer))
    )


def make_loaders(
    run: config.Run, train: Dataset, validation: Dataset, task: Task, pad_id: int
) -> tuple[Loader, Loader]:
    """Training batches in an order fixed by (seed, epoch), and validation batches, as the recipe asks for them."""
    settings, rank, world = run.data, ranks.rank(), ranks.world_size()
    grouped, workers = settings.group_by_length, settings.workers
    return (
        data.make_loader(
            train,
            task,
            pad_id,
            settings.batch_size,
            run.trainer.accumulate,
            run.seed,
            grouped,
            workers,
            rank,
            world,
        ),
        data.make_loader(validation, task, pad_id, run.evaluate.batch_size, rank=rank, world=world),
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

    What `folder` holds of checkpoints is gone on from. `rate` is the recipe's key of the learning rate, to be named should the
    training diverge.
    """
    metric = f"val/{module.task.primary}"
    best = BestCheckpoint(metric, module.task.maximise)
    start = ranks.run_on_rank_zero(lambda: checkpoints.newest_intact(folder))
    if start is not None:
        log.info("going on from %s", start)
    for logger in (logger for logger in loggers if isinstance(logger, CsvLogger)):
        logger.drop_from_step(checkpoints.step_of(start) if start is not None else 0)
    with silence_lightning(), signals.defer_stop_signals() as requests:
        first = [
            PerBatchSeed(train.plan.seed or 0),
            CheckpointSaver(folder, settings.checkpoint, module.steps, best, requests),
        ]
        # the user's callbacks come before ours that look: those see what they did
        ours = [
            *first,
            *callbacks,
            *_lookers(module, settings, best),
            *([performance.CompileBlocks()] if settings.compile else []),
        ]
        trainer = _trainer(settings, module.steps, train, logger=loggers, callbacks=ours)
        with reraise_interrupt(trainer), performance.keep_freed_memory():
            trainer.fit(module, train, validation, ckpt_path=start, weights_only=True)
    return {metric: best.score, "step": _load_best(module, folder, best, rate)}


def _lookers(
    module: Distillation, settings: config.Trainer, best: "BestCheckpoint"
) -> list[Callback]:
    """The callbacks that look at the validation split, and what comes of it."""
    lookers = [
        ValidationSchedule(module.steps, settings.validations),
        ConsoleLogger(best.metric),
        best,
    ]
    if settings.patience is not None:
        direction = "max" if best.maximise else "min"
        lookers.append(
            PatientEarlyStopping(
                module.steps, monitor=best.metric, mode=direction, patience=settings.patience
            )
        )
    return (
        [*lookers, ProgressBar(leave=False, refresh_rate=2)]
        if show_progress(settings.progress)
        else lookers
    )


def _load_best(module: Distillation, folder: Path, best: "BestCheckpoint", rate: str) -> int:
    """Give the module the weights that did best, and return their step; RunFailed where there are none that are finite."""
    checkpoint = (
        None
        if best.step is None
        else torch.load(
            checkpoints.checkpoint_path(folder, best.step), map_location="cpu", weights_only=True
        )
    )
    if (
        best.step is None
        or checkpoint is None
        or not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    ):
        raise RunFailed(
            f"{rate} is {module.settings.lr:g}, but with it the training diverged and left no finite weights: lower {rate}"
        )
    weights = {
        name.removeprefix("student."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    module.student.load_state_dict(weights)
    module.eval()
    if ranks.is_rank_zero():
        store.link_file(checkpoints.checkpoint_path(folder, best.step), folder / "best.ckpt")
        store.link_file(checkpoints.newest(folder), folder / "last.ckpt")
    return best.step


def _trainer(
    settings: config.Trainer, count_steps: int, train: Loader, **options: Any
) -> L.Trainer:
    # `deterministic` would have it: NaN first in all memory that is about to be written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer = L.Trainer(
        **fsdp.lightning_strategy(settings),
        precision=resolve_precision(settings),  # type: ignore[arg-type]
        max_steps=count_steps,
        max_epochs=math.ceil(count_steps / train.plan.steps),
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=1,  # until Looks says more: a resumed training takes up where a look at the validation split was over
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn",
        log_every_n_steps=max(1, min(10, count_steps // 20)),
        enable_progress_bar=any(
            isinstance(callback, ProgressBar) for callback in options["callbacks"]
        ),
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # they are handled here
    return trainer


def _in_final_form(trainer: L.Trainer) -> bool:
    """Whether no technique will change the student any more: only then a look at the validation split counts."""
    return all(technique.reached == 1 for technique in compressions(trainer.callbacks))  # type: ignore[attr-defined]


class BestCheckpoint(Callback):
    """Remembers the step after which the student did best on the validation split."""

    def __init__(self, metric: str, maximise: bool) -> None:
        self.metric, self.maximise = metric, maximise
        self.score = math.nan
        self.step: int | None = None

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        score = float(trainer.callback_metrics[self.metric])
        better = score > self.score if self.maximise else score < self.score
        if _in_final_form(trainer) and (better or math.isnan(self.score)):
            self.score, self.step = score, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step = state["score"], state["step"]


class PatientEarlyStopping(EarlyStopping):
    """Stops where the validation split shows no improvement; a training that goes on for longer has all its patience again."""

    def __init__(self, count_steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.steps = count_steps

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["steps"] != self.steps:
            self.wait_count = 0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if _in_final_form(trainer):
            super().on_validation_end(trainer, module)


class ValidationSchedule(Callback):
    """Looks at the validation split after optimizer steps that are evenly spaced, and after the last."""

    def __init__(self, count_steps: int, validations: int) -> None:
        self.steps, self.every, self._seen = count_steps, math.ceil(count_steps / validations), 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, before = trainer.global_step, self._seen
        trainer.val_check_batch = 1 if step > before and step % self.every == 0 else NEVER
        trainer.should_stop = trainer.should_stop or step >= self.steps  # which is a reason to look
        self._seen = step


class ConsoleLogger(Callback):
    """One log line per look at the validation split: what a terminal without a progress bar, and train.log, show."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = {
            name: trainer.callback_metrics[name]
            for name in ("train/loss", self.metric)
            if name in trainer.callback_metrics
        }
        told = ", ".join(
            f"{name.removeprefix('train/')} {float(value):.4f}" for name, value in values.items()
        )
        said = f"step {trainer.global_step} of {trainer.max_steps}: {told}"
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.say(said)
            log.debug(said)  # for train.log
        else:
            log.info(said)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, without the version of its logger."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {
            name: value
            for name, value in super().get_metrics(*arguments).items()
            if name != "v_num"
        }

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
def silence_lightning() -> Iterator[None]:
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
def reraise_interrupt(trainer: L.Trainer) -> Iterator[None]:
    """Lightning answers Ctrl-C with `sys.exit`; this hands the KeyboardInterrupt on, so that the run can say what is kept."""
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt if trainer.interrupted else ended from None
