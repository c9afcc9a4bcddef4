"""Checkpoints of a training that can be killed at any moment: when they are taken, how they are written, which one to go on from.

They are taken between two optimizer steps, when all that belongs to the step before is done: its log, its look at the validation
split. Their names are `step-00000012.ckpt`, with a checksum beside each.
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

from distill import store
from distill.errors import RunFailed
from distill.processes import ranks
from distill.processes.signals import StopRequested, StopRequests
from distill.recipe import config

log = logging.getLogger("distill")

BEST = "best_step"  # key of a checkpoint: the step whose checkpoint did best so far


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(file: Path) -> int:
    """The step of a checkpoint."""
    return int(file.stem.removeprefix("step-"))


def newest(folder: Path) -> Path:
    """The checkpoint that was taken last."""
    return _all(folder)[0]


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, and whose best one is too; null where there is none."""
    damaged, found = [], None
    for file in _all(folder):
        found = file if _intact(file) else None
        if found is not None:
            break
        damaged.append(file.name)
    if damaged:
        instead = (
            f"{found.name} is used in its place"
            if found is not None
            else "the training begins anew"
        )
        log.warning("%s in %s is damaged: %s", " and ".join(damaged), folder, instead)
    return found


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def _manifest(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}


def _intact(file: Path) -> bool:
    told = _manifest(file)
    try:
        whole = told.get("sha256") == store.sha256(file)
    except OSError:
        return False
    best = told.get(BEST)
    return whole and (
        best is None
        or checkpoint_path(file.parent, best) == file
        or _intact(checkpoint_path(file.parent, best))
    )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and its checksum before it; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        file, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        told = {
            "sha256": hashlib.sha256(content.getbuffer()).hexdigest(),
            BEST: checkpoint.get(BEST),
        }
        try:
            store.write_file(file.with_suffix(".json"), json.dumps(told).encode())
            store.write_file(file, content.getbuffer())
        except OSError as error:
            file.with_suffix(".json").unlink(missing_ok=True)
            raise RunFailed(_unwritten(file, error)) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> Any:
        return super().load_checkpoint(path, map_location, weights_only=True)


def _unwritten(file: Path, error: OSError) -> str:
    others = [other.name for other in _all(file.parent) if other != file]
    kept = f"{others[0]} is intact" if others else "none was written before"
    return f"{file} cannot be written ({error.strerror}), but a run keeps its state there: make room and resume it; {kept}"


class PerBatchSeed(Callback):
    """Seeds all generators anew for each batch, from (seed, rank, number of the batch): nothing of them needs to be saved."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        value = int(
            np.random.SeedSequence([self.seed, trainer.global_rank, number]).generate_state(
                1, np.uint64
            )[0]
        )
        if torch.cuda.is_available():
            torch.manual_seed(value)
        else:
            torch.default_generator.manual_seed(
                value
            )  # the same without noting, for a GPU that may come, who asked for it
        random.seed(value)
        np.random.seed(value % 2**32)


class CheckpointSaver(Callback):
    """Takes the checkpoints; comes before all callbacks that change anything when a batch begins.

    `best` is asked for the step that did best so far. A request to end is answered when the state is saved.
    """

    def __init__(
        self,
        folder: Path,
        settings: config.Checkpoint,
        steps: int,
        best: Any,
        requests: StopRequests,
    ) -> None:
        self.folder, self.settings, self.steps, self.best, self.requests = (
            folder,
            settings,
            steps,
            best,
            requests,
        )
        self.ended = False  # the training, at this many steps or before
        self._saved, self._time, self._looked = 0, 0.0, False
        self._saving = ""
        self._loops: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"ended": self.ended, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ended = state["ended"] and state["steps"] >= self.steps

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = self.ended

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved, self._time = trainer.global_step, time.monotonic()
        if ranks.is_rank_zero():
            for file in _all(self.folder):
                if file > checkpoint_path(
                    self.folder, self._saved
                ):  # damaged: what comes now takes its place
                    _remove(file)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.completed % trainer.accumulate_grad_batches == 0:
            due, asked = self._agreed(self._due(trainer.global_step))
            if trainer.global_step > self._saved and (due or asked):
                self._save(trainer, "between batches")
            if asked:
                number, self.requests.number = asked, 0
                raise StopRequested(number)

    def _due(self, step: int) -> bool:
        by_steps = self.settings.steps is not None and step - self._saved >= self.settings.steps
        by_time = (
            self.settings.minutes is not None
            and time.monotonic() - self._time >= 60 * self.settings.minutes
        )
        return by_steps or by_time or self._looked

    def _agreed(self, due: bool) -> tuple[bool, int]:
        """What any rank wants, all do: their clocks and signals differ."""
        wanted, number = ranks.all_reduce_max([due, self.requests.number])
        return bool(wanted), number

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._looked, self._loops = True, deepcopy(trainer.fit_loop.state_dict())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._loops:
            self.ended = True
            self._save(trainer, "at the end")

    def _save(self, trainer: L.Trainer, when: str) -> None:
        self._saving = when
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
        self._saving, self._looked = "", False
        self._saved, self._time = trainer.global_step, time.monotonic()
        if ranks.is_rank_zero():
            prune(self.folder, self.settings.keep)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Describe the loops as they are when a look at the validation split ends: from there Lightning resumes exactly."""
        checkpoint[BEST] = self.best.step
        if self._saving == "at the end":
            checkpoint["loops"]["fit_loop"] = (
                self._loops
            )  # as they were before the last epoch was closed
        elif self._saving == "between batches":
            _before_the_batch(checkpoint["loops"]["fit_loop"])


def _before_the_batch(loops: dict[str, Any]) -> None:
    """The batch that has just been handed out was not."""
    batches = loops["epoch_loop.batch_progress"]
    batches["total"]["ready"] -= 1
    batches["current"]["ready"] -= 1
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= (
        1  # counted after a look at the validation split
    )
    for loader in loops["state_dict"]["combined_loader"]:
        loader["position"] -= 1


def prune(folder: Path, keep: int) -> None:
    """Leave the newest checkpoints, and those that were best when one of them was taken."""
    files = _all(folder)
    kept = files[:keep]
    best = {
        checkpoint_path(folder, told[BEST])
        for told in map(_manifest, kept)
        if told.get(BEST) is not None
    }
    for file in files:
        if file not in kept and file not in best:
            _remove(file)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
