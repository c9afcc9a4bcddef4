"""The progress bar and the log lines of a training."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar

from distill.training.throughput import Throughput

log = logging.getLogger(__name__)

# Lightning's warnings about settings that are deliberate here.
ADVICE = (
    ".*does not have many workers.*",
    ".*in eval mode.*",
    ".*exists and is not empty.*",
    ".*deterministic.*",
    ".*treespec.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # logged values are already summed over the ranks
)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the version of its logger."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def print_above(self, line: str) -> None:
        """Print a line above the bar, which would overwrite it otherwise."""
        if self.progress is not None:
            self.progress.console.print(line, highlight=False)


class ConsoleLogger(Callback):
    """Logs one line per validation run.

    Args:
        metric: name of the validation metric to show beside the loss.
        throughput: measures the speed to show.
    """

    def __init__(self, metric: str, throughput: Throughput) -> None:
        self.metric, self.throughput = metric, throughput

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = {
            name.removeprefix("train/"): float(trainer.callback_metrics[name])
            for name in ("train/loss", self.metric)
            if name in trainer.callback_metrics
        }
        shown = [f"{name} {value:.4f}" for name, value in values.items()]
        metrics = ", ".join(filter(None, [*shown, self.throughput.describe()]))
        line = f"step {trainer.global_step} of {trainer.max_steps}: {metrics}"
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.print_above(line)
            log.debug(line)  # for train.log
        else:
            log.info(line)


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Hide Lightning's warnings about settings that are deliberate here."""
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
    """Raise KeyboardInterrupt at Ctrl-C, where Lightning would call `sys.exit`."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt if trainer.interrupted else error from None
