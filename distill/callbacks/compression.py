"""The base class of all compression techniques, and the order in which they are applied."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

from distill.compress.schedule import Schedule
from distill.errors import RunFailed, UserError
from distill.module import Distillation
from distill.processes import ranks
from distill.recipe.capabilities import QuantizedLayers

__all__ = ["STAGES", "Compression", "compressions", "order_callbacks", "prefix_with_key"]

# A technique may start only after those of earlier stages have ended, since they would undo it.
# Sparsity and quantization may overlap, since quantizers map zeros to zeros.
STAGES = ("structure", "factors", "sparsity", "quantization", "vocabulary")


class Compression(Callback):
    """Base class of the techniques, which change the student in place while it trains.

    A subclass implements :meth:`prepare` and :meth:`change` and, where needed, the other hooks. Its
    state is in :meth:`state_dict`. The structure of the student (widths, factors, quantizers) is
    written to `student.config`, and is restored from there before any hook is called.

    Args:
        start: when the technique begins, as a share of the training in [0, 1] or in optimizer
            steps (``"500 steps"``).
        end: when it reaches its target.
        shape: shape of the schedule in between: ``cubic``, ``linear`` or ``one_shot``.
        every: optimizer steps between two changes.

    Attributes:
        progress: the share of the target that has been applied so far, in [0, 1].
    """

    stage: ClassVar[str]
    """One of `STAGES`."""
    name = ""
    """The key in the recipe's section `callbacks`."""

    def __init__(self, start: float | str, end: float | str, shape: str, every: int) -> None:
        with self.prefix_errors():
            self.schedule = Schedule(start, end, shape)
        if not (isinstance(every, int) and every >= 1):
            raise self.error(
                f"every is {every}, but it must be a whole number of steps: 1 acts after each step"
            )
        self.every = every
        self.progress = 0.0
        self._last_step = 0  # global step at the last call

    def error(self, message: str) -> UserError:
        """An error whose message begins with the name of the class."""
        return UserError(f"{type(self).__name__}: {message}")

    @contextmanager
    def prefix_errors(self) -> Iterator[None]:
        """Prefix UserErrors raised inside the context with the name of the class."""
        try:
            yield
        except UserError as error:
            raise self.error(str(error)) from error

    def check(self, total: int) -> None:
        """Check the schedule against a run of `total` optimizer steps.

        Raises:
            UserError: if it does not fit.
        """
        with self.prefix_errors():
            self.schedule.check(total)

    def quantization(self) -> QuantizedLayers | None:
        """How the technique quantizes layers, for the check against the export's format.

        None if it does not quantize.
        """
        return None

    def final_width(self, student: PreTrainedModel) -> int | None:
        """Input features that the technique will leave to the layers that it makes narrower.

        -1 if they are not known yet, or differ; None if it changes no width from now on.
        """
        return None

    def bind_to_data(self, tokenizer: Any, texts: Iterable[str]) -> None:
        """Called before training, with the student's tokenizer and all training texts."""

    @abstractmethod
    def prepare(self, module: Distillation) -> None:
        """Called before the first step, and before that of a resumed run.

        Raises:
            UserError: if the recipe names layers that the student does not have, for example.
        """

    @abstractmethod
    def change(self, module: Distillation, amount: float) -> None:
        """Apply a share of the target, in (0, 1], to the student; called with 1 at the end."""

    def after_step(self, module: Distillation) -> None:
        """Called after each optimizer step, for example to apply masks again."""

    def rank_synced_state(self) -> dict[str, Tensor]:
        """Tensors, such as masks, that must be equal on all ranks; compared after each change."""
        return {}

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        """Finish the trained student, in place, and return its tokenizer."""
        return tokenizer

    @property
    def state_key(self) -> str:
        """The key in checkpoints; callbacks of the same class have different ones."""
        return f"{type(self).__qualname__} {self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"progress": self.progress, "last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress, self._last_step = state["progress"], state["last_step"]

    def other_techniques(self, trainer: L.Trainer) -> list["Compression"]:
        """The other techniques of the run."""
        techniques = compressions(trainer.callbacks)  # type: ignore[attr-defined]
        return [technique for technique in techniques if technique is not self]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        with prefix_with_key(self.name):
            self.check(trainer.max_steps)
            self.prepare(module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._change_if_due(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Distillation)
        if trainer.global_step > self._last_step:  # gradient accumulation: only after a step
            self._last_step = trainer.global_step
            self.after_step(module)
            self._change_if_due(trainer, module)

    def _change_if_due(self, trainer: L.Trainer, module: Any) -> None:
        step, total = trainer.global_step, trainer.max_steps
        amount = self.schedule.at(step, total)
        due = amount == 1 or (step - self.schedule.first(total)) % self.every == 0
        if amount > self.progress and due:
            self.progress = amount
            self.change(module, amount)
            _check_same_on_all_ranks(type(self).__name__, self.rank_synced_state())


@contextmanager
def prefix_with_key(name: str) -> Iterator[None]:
    """Prefix UserErrors raised inside the context with the callback's key in the recipe."""
    try:
        yield
    except UserError as error:
        key, message = f"callbacks.{name}", str(error)
        has_key = not name or message.startswith(key)
        raise UserError(message if has_key else f"{key}: {message}") from error


def compressions(callbacks: Iterable[Callback]) -> list[Compression]:
    """The callbacks that compress the student."""
    return [callback for callback in callbacks if isinstance(callback, Compression)]


def order_callbacks(callbacks: list[Callback], total: int) -> list[Callback]:
    """Sort callbacks: first those that do not compress, then the techniques by stage.

    Args:
        callbacks: all callbacks of the run.
        total: number of optimizer steps.

    Raises:
        UserError: if a technique starts before one of an earlier stage has ended, or its schedule
            does not fit the training.
    """
    techniques = sorted(compressions(callbacks), key=lambda callback: STAGES.index(callback.stage))
    for technique in techniques:
        with prefix_with_key(technique.name):
            technique.check(total)
    for earlier, later in combinations(techniques, 2):
        _check_order(earlier, later, total)
    others = [callback for callback in callbacks if not isinstance(callback, Compression)]
    return [*others, *techniques]


def _check_order(earlier: Compression, later: Compression, total: int) -> None:
    stages = {earlier.stage, later.stage}
    if len(stages) == 1 or stages == {"sparsity", "quantization"}:
        return
    end, start = earlier.schedule.last(total), later.schedule.first(total)
    if start < end:
        raise UserError(
            f"callbacks.{later.name} starts at step {start}, but callbacks.{earlier.name} changes "
            f"the student's {earlier.stage} until step {end}, which would undo it: "
            f"start it later, or end callbacks.{earlier.name} earlier"
        )


def _check_same_on_all_ranks(technique: str, tensors: dict[str, Tensor]) -> None:
    """Raise RunFailed if the tensors differ between ranks."""
    if ranks.world_size() == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + data.numpy().tobytes())
    different = len(set(ranks.all_gather(digest.hexdigest())))
    if different > 1:
        raise RunFailed(
            f"{technique} has {different} different states on {ranks.world_size()} ranks, but all "
            "must have the same: report this as a defect"
        )
