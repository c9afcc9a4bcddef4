"""When the state of a training is saved, so that it may be killed at any moment.

Checkpoints are taken between two optimizer steps, when logging and validation of the step before
are done.
"""

import random
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from distill import internals
from distill.processes import ranks
from distill.processes.signals import StopRequested, StopRequests
from distill.recipe import config
from distill.training import checkpoint_files as files
from distill.training.checkpoint_writer import AtomicCheckpointIO
from distill.training.validation_runs import BestCheckpoint


class PerBatchSeed(Callback):
    """Seeds all generators for each batch, so that checkpoints need not hold their states.

    Args:
        seed: seed of the run, combined with the rank and the number of the batch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        entropy = [self.seed, trainer.global_rank, internals.batches_started(trainer)]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        if torch.cuda.is_available():
            torch.manual_seed(seed)
        else:
            # torch.manual_seed would also record the call for a GPU that may be initialized later.
            torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


class CheckpointSaver(Callback):
    """Saves checkpoints: by steps, by time, after validation runs, on a stop signal, at the end.

    It must come before all callbacks that change anything at the start of a batch.

    Args:
        folder: folder of the checkpoints.
        settings: the recipe's section `trainer.checkpoint`.
        steps: optimizer steps of the training.
        best: tracks the best step.
        requests: signals to stop; training ends once its state is saved.
    """

    def __init__(
        self,
        folder: Path,
        settings: config.Checkpoint,
        steps: int,
        best: BestCheckpoint,
        requests: StopRequests,
    ) -> None:
        self.folder, self.settings, self.steps = folder, settings, steps
        self.best, self.requests = best, requests
        self.ended = False  # whether training ended, after `steps` or early
        self.started = False  # whether this process trains, and has loaded a checkpoint if any
        self._saved_step, self._saved_time = 0, 0.0
        self._validated = False  # since the last checkpoint
        self._saving = ""  # what is being saved: "between batches", "at the end"
        self._loops: dict[str, Any] = {}  # state of the fit loop after the last validation run

    def state_dict(self) -> dict[str, Any]:
        return {"ended": self.ended, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ended = state["ended"] and state["steps"] >= self.steps

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = self.ended

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = True
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if ranks.is_rank_zero():
            resumed = files.checkpoint_path(self.folder, self._saved_step)
            for file in files.newest_first(self.folder):
                if file > resumed:  # damaged
                    files.remove(file)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, AtomicCheckpointIO):
            writer.raise_errors()
        if internals.batches_of_epoch(trainer) % trainer.accumulate_grad_batches == 0:
            due, signal = self._agree(trainer)
            if trainer.global_step > self._saved_step and (due or signal):
                self._save(trainer, "between batches")
            if signal:
                self.requests.number = 0
                raise StopRequested(signal)

    def _agree(self, trainer: L.Trainer) -> tuple[bool, int]:
        """Whether a checkpoint is due on any rank, and the signal of any rank.

        Clocks and signals differ between ranks, which compare them at logged steps only: each
        comparison waits for the slowest rank.
        """
        step, settings = trainer.global_step, self.settings
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        by_steps = settings.steps is not None and step - self._saved_step >= settings.steps
        due = by_steps or self._validated
        if ranks.world_size() > 1 and step % interval:
            return due, 0
        seconds = time.monotonic() - self._saved_time
        by_time = settings.minutes is not None and seconds >= 60 * settings.minutes
        any_by_time, signal = ranks.all_reduce_max([by_time, self.requests.number])
        return due or bool(any_by_time), signal

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._validated, self._loops = True, deepcopy(trainer.fit_loop.state_dict())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._loops:
            self.ended = True
            self._save(trainer, "at the end")

    def _save(self, trainer: L.Trainer, when: str) -> None:
        self._saving = when
        trainer.save_checkpoint(files.checkpoint_path(self.folder, trainer.global_step))
        self._saving, self._validated = "", False
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the state of the loops so that Lightning resumes exactly."""
        checkpoint[files.BEST] = self.best.step
        if self._saving == "at the end":
            checkpoint["loops"]["fit_loop"] = self._loops  # before the last epoch ended
        elif self._saving == "between batches":
            internals.rewind_one_batch(checkpoint["loops"]["fit_loop"])
