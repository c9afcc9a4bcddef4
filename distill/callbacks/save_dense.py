"""The student before compression, saved to measure what compression costs."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from distill.callbacks.compression import Compression

__all__ = ["SaveDense"]


class SaveDense(Callback):
    """Saves the student once, just before the first technique changes it.

    Args:
        techniques: the techniques of the run; those that do nothing during training are ignored.
        total: number of optimizer steps of the run.
        save: saves the student; called on rank zero.
    """

    def __init__(
        self, techniques: Iterable[Compression], total: int, save: Callable[[], None]
    ) -> None:
        starts = [
            technique.schedule.first(total) for technique in techniques if technique.progress < 1
        ]
        self.step, self.save, self.saved = min(starts, default=total + 1), save, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save_if_due(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= self.step and not self.saved:
            self.saved = True
            if trainer.is_global_zero:
                self.save()

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["saved"]
