"""Checkpoints of a training that may be killed at any moment.

They are taken between two optimizer steps, when logging and validation of the step before are
done. Files are named `step-00000012.ckpt`, with a checksum beside each.
"""

import hashlib
import io
import json
import logging
import random
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from distill import internals, store
from distill.errors import RunFailed
from distill.processes import ranks
from distill.processes.signals import StopRequested, StopRequests
from distill.recipe import config
from distill.training.validation_runs import BestCheckpoint

log = logging.getLogger("distill")

BEST = "best_step"  # key of a checkpoint: the step of the best checkpoint so far


# ---- files


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(file: Path) -> int:
    """The step of a checkpoint's file."""
    return int(file.stem.removeprefix("step-"))


def newest(folder: Path) -> Path:
    """The checkpoint that was taken last."""
    return _newest_first(folder)[0]


def newest_intact(folder: Path) -> Path | None:
    """The newest undamaged checkpoint whose best one is undamaged too; None if there is none."""
    damaged, intact = [], None
    for file in _newest_first(folder):
        if _is_intact(file):
            intact = file
            break
        damaged.append(file.name)
    if damaged:
        instead = "training starts from the beginning"
        if intact is not None:
            instead = f"{intact.name} is used in its place"
        log.warning("%s in %s is damaged: %s", " and ".join(damaged), folder, instead)
    return intact


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best ones that they refer to."""
    files = _newest_first(folder)
    newest_files = files[:keep]
    steps = [_read_manifest(file).get(BEST) for file in newest_files]
    best = {checkpoint_path(folder, step) for step in steps if step is not None}
    for file in files:
        if file not in newest_files and file not in best:
            _remove(file)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}


def _is_intact(file: Path) -> bool:
    manifest = _read_manifest(file)
    try:
        intact = manifest.get("sha256") == store.sha256(file)
    except OSError:
        return False
    if not intact or manifest.get(BEST) is None:
        return intact
    best = checkpoint_path(file.parent, manifest[BEST])
    return best == file or _is_intact(best)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint atomically, after its checksum.

    Loads tensors and plain values only, so that a file cannot execute code.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        file, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        checksum = hashlib.sha256(content.getbuffer()).hexdigest()
        manifest = {"sha256": checksum, BEST: checkpoint.get(BEST)}
        try:
            store.write_file(file.with_suffix(".json"), json.dumps(manifest).encode())
            store.write_file(file, content.getbuffer())
        except OSError as error:
            file.with_suffix(".json").unlink(missing_ok=True)
            raise RunFailed(_write_error(file, error)) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> Any:
        return super().load_checkpoint(path, map_location, weights_only=True)


def _write_error(file: Path, error: OSError) -> str:
    others = [other.name for other in _newest_first(file.parent) if other != file]
    state = f"{others[0]} is intact" if others else "none was written before"
    return (
        f"{file} cannot be written ({error.strerror}), but a run saves its state there: make room "
        f"and resume it; {state}"
    )


# ---- callbacks


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
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if ranks.is_rank_zero():
            resumed = checkpoint_path(self.folder, self._saved_step)
            for file in _newest_first(self.folder):
                if file > resumed:  # damaged
                    _remove(file)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if internals.batches_of_epoch(trainer) % trainer.accumulate_grad_batches == 0:
            due, signal = self._agree(self._is_due(trainer.global_step))
            if trainer.global_step > self._saved_step and (due or signal):
                self._save(trainer, "between batches")
            if signal:
                self.requests.number = 0
                raise StopRequested(signal)

    def _is_due(self, step: int) -> bool:
        settings = self.settings
        by_steps = settings.steps is not None and step - self._saved_step >= settings.steps
        by_time = (
            settings.minutes is not None
            and time.monotonic() - self._saved_time >= 60 * settings.minutes
        )
        return by_steps or by_time or self._validated

    def _agree(self, due: bool) -> tuple[bool, int]:
        """Whether a checkpoint is due on any rank (clocks differ), and the signal of any rank."""
        any_due, signal = ranks.all_reduce_max([due, self.requests.number])
        return bool(any_due), signal

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._validated, self._loops = True, deepcopy(trainer.fit_loop.state_dict())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._loops:
            self.ended = True
            self._save(trainer, "at the end")

    def _save(self, trainer: L.Trainer, when: str) -> None:
        self._saving = when
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
        self._saving, self._validated = "", False
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if ranks.is_rank_zero():
            prune(self.folder, self.settings.keep)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the state of the loops so that Lightning resumes exactly."""
        checkpoint[BEST] = self.best.step
        if self._saving == "at the end":
            checkpoint["loops"]["fit_loop"] = self._loops  # before the last epoch ended
        elif self._saving == "between batches":
            internals.rewind_one_batch(checkpoint["loops"]["fit_loop"])
