"""What all techniques share: when they act, what of them a checkpoint holds, and what they may act on."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.compress.schedule import Schedule
from distill.errors import RunFailed, UserError
from distill.models import blocks, group_names
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import LINEAR

log = logging.getLogger("distill")

# A technique may begin only when those before it have ended: what an earlier one decides, a later one must not undo.
# Sparsity and quantization may overlap: a quantizer keeps zeros.
STAGES = ("structure", "factors", "sparsity", "quantization", "vocabulary")


class Compression(Callback):
    """Changes the student in place, on a schedule, while training repairs the damage.

    A subclass says what to do in :meth:`prepare`, :meth:`change` and :meth:`after_step`. What it must remember is in
    :meth:`state_dict`; the form of the student itself (widths, factors, quantizers) is in `student.config` and comes back first.
    """

    stage: ClassVar[str]  # of STAGES
    name = ""  # in the recipe

    def __init__(self, start: float, end: float, shape: str, every: int) -> None:
        with self.prefix_errors():
            self.schedule = Schedule(start, end, shape)
        if not (isinstance(every, int) and every >= 1):
            raise self.error(
                f"every is {every}, but it is a number of optimizer steps: 1 acts at each of them"
            )
        self.every = every
        self.reached = 0.0  # share of the target that the student has come to
        self._seen = 0  # optimizer steps

    def error(self, sentence: str) -> UserError:
        """A refusal that says whose arguments it is about."""
        return UserError(f"{type(self).__name__}: {sentence}")

    @contextmanager
    def prefix_errors(self) -> Iterator[None]:
        """What a function refuses is said as :meth:`wrong` says it."""
        try:
            yield
        except UserError as error:
            raise self.error(str(error)) from error

    def check(self, total: int) -> None:
        """UserError where the schedule does not fit a training of `total` steps."""
        with self.prefix_errors():
            self.schedule.check(total)

    def bind_to_data(self, tokenizer: Any, texts: Iterable[str]) -> None:
        """Learn what there is to know of the training texts, in their whole length, before any training."""

    @abstractmethod
    def prepare(self, module: Distillation) -> None:
        """Find what to act on, before the first step or after a resume; UserError where the recipe names what is not there."""

    @abstractmethod
    def change(self, module: Distillation, amount: float) -> None:
        """Bring the student to this share of the target, in (0, 1]; 1 is final."""

    def after_step(self, module: Distillation) -> None:
        """What must hold after every optimizer step, such as zeros that stay zero."""

    def rank_synced_state(self) -> dict[str, Tensor]:
        """What was chosen from numbers that may differ between ranks, and must not: masks, say."""
        return {}

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        """Leave the trained student in the form that is measured and exported; returns its tokenizer."""
        return tokenizer

    @property
    def state_key(self) -> str:
        """Its own for each of several callbacks of one class."""
        return f"{type(self).__qualname__} {self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached, self._seen = state["reached"], state["seen"]

    def other_techniques(self, trainer: L.Trainer) -> list["Compression"]:
        """The other techniques of this training."""
        return [technique for technique in compressions(trainer.callbacks) if technique is not self]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Distillation)
        with prefix_with_key(self.name):
            self.check(trainer.max_steps)
            self.prepare(module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._advance(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Distillation)
        if trainer.global_step > self._seen:  # not between the micro-batches of one step
            self._seen = trainer.global_step
            self.after_step(module)
            self._advance(trainer, module)

    def _advance(self, trainer: L.Trainer, module: Any) -> None:
        step, total = trainer.global_step, trainer.max_steps
        amount = self.schedule.at(step, total)
        due = amount == 1 or (step - self.schedule.first(total)) % self.every == 0
        if amount > self.reached and due:
            self.reached = amount
            self.change(module, amount)
            _same_on_all_ranks(type(self).__name__, self.rank_synced_state())


@contextmanager
def prefix_with_key(name: str) -> Iterator[None]:
    """A refusal that begins with the recipe's key of the callback."""
    try:
        yield
    except UserError as error:
        raise UserError(f"callbacks.{name}: {error}" if name else str(error)) from error


class SaveDense(Callback):
    """Saves the student as it is before the first technique changes it: what compression costs is told from it."""

    def __init__(
        self, techniques: Iterable[Compression], total: int, save: Callable[[], None]
    ) -> None:
        steps = [
            technique.schedule.first(total) for technique in techniques if technique.reached < 1
        ]  # the others wait for the end
        self.step, self.save, self.saved = min(steps, default=total + 1), save, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= self.step and not self.saved:
            self.saved = True
            if trainer.is_global_zero:
                self.save()

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["saved"]


def compressions(callbacks: Iterable[Callback]) -> list[Compression]:
    """Those that change the student."""
    return [callback for callback in callbacks if isinstance(callback, Compression)]


def order_callbacks(callbacks: list[Callback], total: int) -> list[Callback]:
    """The callbacks of a training of `total` steps, those that compress last and by stage; UserError where two exclude each other."""
    techniques = sorted(
        compressions(callbacks), key=lambda technique: STAGES.index(technique.stage)
    )
    for technique in techniques:
        with prefix_with_key(technique.name):
            technique.check(total)
    for earlier, later in combinations(techniques, 2):
        if {earlier.stage, later.stage} <= {
            "sparsity",
            "quantization",
        } or earlier.stage == later.stage:
            continue
        ends, starts = earlier.schedule.last(total), later.schedule.first(total)
        if starts < ends:
            raise UserError(
                f"callbacks.{later.name} starts at step {starts}, but callbacks.{earlier.name} changes the student's {earlier.stage} "
                f"until step {ends}, which would undo it: start it later, or end callbacks.{earlier.name} earlier"
            )
    return [*(each for each in callbacks if not isinstance(each, Compression)), *techniques]


def _same_on_all_ranks(name: str, decided: dict[str, Tensor]) -> None:
    if ranks.world_size() == 1:
        return
    digest = hashlib.sha256()
    for key, tensor in sorted(decided.items()):
        digest.update(
            key.encode()
            + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    different = len(set(ranks.all_gather(digest.hexdigest())))
    if different > 1:
        raise RunFailed(
            f"the masks of {name} are {different} different ones, but all ranks must have the same: report this as a defect"
        )


def select_modules(
    student: PreTrainedModel,
    patterns: Iterable[str] | None,
    kinds: tuple[type[nn.Module], ...] = LINEAR,
) -> dict[str, nn.Module]:
    """The modules of these kinds whose names fit a pattern (`*.ffn.lin1`); null: all that are inside the transformer blocks."""
    if isinstance(patterns, str):
        raise UserError(f"layers is {patterns}, but it must be a list of patterns: [{patterns}]")
    known = {name: module for name, module in student.named_modules() if isinstance(module, kinds)}
    if patterns is None:
        inside = {id(module) for block in blocks(student) for module in block.modules()}
        return {name: module for name, module in known.items() if id(module) in inside}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(
                f"layers has {pattern}, but the student has no such layer: its layers are {', '.join(group_names(known))}"
            )
    return {
        name: module
        for name, module in known.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def expand_low_rank(
    layers: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...] = LINEAR
) -> dict[str, Any]:
    """The modules of these kinds that layers stand for: a factorized one for its two factors, any other for itself."""
    return {
        name: part
        for outer, layer in layers.items()
        for name, part in layer.named_modules(prefix=outer)
        if isinstance(part, kinds)
    }


def compression_config(student: PreTrainedModel) -> dict[str, Any]:
    """`student.config.compression`, which says what the config's own keys cannot: see `distill/runtime/modeling.py`."""
    if getattr(student.config, "compression", None) is None:
        student.config.compression = {}
    return student.config.compression
