"""When validation runs take place, which step is best, and when to stop early."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

from distill import internals
from distill.callbacks.compression import compressions


class ValidationSchedule(Callback):
    """Runs validation after evenly spaced optimizer steps, and after the last.

    Args:
        steps: optimizer steps of the training.
        validations: number of validation runs.
    """

    def __init__(self, steps: int, validations: int) -> None:
        self.steps, self.every = steps, math.ceil(steps / validations)
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, before = trainer.global_step, self._last_step
        internals.validate_after_batch(trainer, step > before and step % self.every == 0)
        # Lightning validates before it stops.
        trainer.should_stop = trainer.should_stop or step >= self.steps
        self._last_step = step


class BestCheckpoint(Callback):
    """Remembers the step with the best validation metric.

    Args:
        metric: name of the metric.
        maximize: whether a larger metric is better.

    Attributes:
        score: the best value so far, NaN before the first.
        step: its step, None before the first.
    """

    def __init__(self, metric: str, maximize: bool) -> None:
        self.metric, self.maximize = metric, maximize
        self.score = math.nan
        self.step: int | None = None

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        score = float(trainer.callback_metrics[self.metric])
        better = score > self.score if self.maximize else score < self.score
        if _has_final_structure(trainer) and (better or math.isnan(self.score)):
            self.score, self.step = score, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step = state["score"], state["step"]


class PatientEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping, whose count restarts if a resumed training has more steps.

    Args:
        steps: optimizer steps of the training.
        options: arguments of Lightning's EarlyStopping.
    """

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["steps"] != self.steps:
            self.wait_count = 0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if _has_final_structure(trainer):
            super().on_validation_end(trainer, module)


def _has_final_structure(trainer: L.Trainer) -> bool:
    """Whether no technique changes the student any more; until then metrics do not compare."""
    techniques = compressions(trainer.callbacks)  # type: ignore[attr-defined]
    return all(technique.progress == 1 for technique in techniques)
