"""Whole layers: physically removed at one step."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.callbacks.prune_structure import Structure
from distill.compress import importance, structure
from distill.compress.observe import Observer
from distill.models.architectures import architecture, blocks
from distill.module import Distillation
from distill.processes import ranks
from distill.terms import AttentionRelations, HiddenStates

log = logging.getLogger("distill")


class PruneLayers(Structure):
    """Remove whole blocks, at `start` and at once: those of these numbers, or the share that turns its input least.

    `layers` are counted from 0 in the student as it starts. With `amount`, block influence up to `start` decides (Men et al. 2024).
    """

    def __init__(
        self, layers: list[int] | None = None, amount: float | None = None, start: float = 0.1
    ) -> None:
        super().__init__(start, start, "one_shot", 1)
        if (layers is None) == (amount is None):
            raise self.error(
                f"layers is {layers} and amount is {amount}, but exactly one of them says what goes: give one"
            )
        if layers is not None and not isinstance(layers, list):
            raise self.error(
                f"layers is {layers}, but it must be a list of layers, counted from 0: [0, 2] removes two"
            )
        if amount is not None:
            self.check_amount(amount)
        self.layers, self.amount = layers, amount
        self._blocks: list[nn.Module] = []
        self._influence: Tensor | None = None  # of each block, gathered
        self._observer: Observer | None = None

    def prepare(self, module: Distillation) -> None:
        if self.reached == 1:
            return
        self.start_over(module, measured=self.amount is not None)
        student = module.student
        self._blocks = list(blocks(student))
        self._check(student)
        self._check_terms(module)
        if self.amount is not None:
            self._observer = importance.BlockInfluence(student)
            gathered = (
                torch.zeros(len(self._blocks)) if self._influence is None else self._influence
            )
            self._influence = gathered.to(student.device)

    def _check(self, student: PreTrainedModel) -> None:
        count = len(self._blocks)
        for key, value in architecture(student.config.model_type).requires.items():
            if getattr(student.config, key) != value:
                raise self.error(
                    f"the student's {key} is {getattr(student.config, key)}, but without {value} its layers cannot move up"
                )
        for layer in self.layers or ():
            if not (isinstance(layer, int) and 0 <= layer < count):
                raise self.error(
                    f"layers has {layer}, but the student has {count} layers: name layers from 0 to {count - 1}"
                )
        going = round((self.amount or 0) * count) if self.layers is None else len(set(self.layers))
        if going >= count:
            asked = (
                f"amount is {self.amount:g}" if self.layers is None else f"layers is {self.layers}"
            )
            raise self.error(
                f"{asked}, but that removes all {count} layers of the student: at least one must stay"
            )

    def _check_terms(self, module: Distillation) -> None:
        first = min(self.layers or [0]) if self.amount is None else 0
        for name, term in module.named_terms():
            named: list[int] = []
            if isinstance(term, HiddenStates):
                named = list(term.layers)
            elif isinstance(term, AttentionRelations):
                named = [term.student_layer]
            for layer in named:
                if layer >= first:
                    raise self.error(
                        f"loss.terms.{name} names layer {layer} of the student, but layers from {first} on go or move up: "
                        "name one before them, or cut the student by student.layers"
                    )

    def after_step(self, module: Distillation) -> None:
        if self._observer is not None and self._influence is not None:
            values = ranks.all_reduce_sum_by_name(self._observer.values)
            self._influence += torch.stack(
                [values[str(place)] for place in range(len(self._blocks))]
            )
            self._observer.values.clear()

    def change(self, module: Distillation, amount: float) -> None:
        kept = [place for place in range(len(self._blocks)) if place not in self._going()]
        if len(kept) < len(self._blocks):
            structure.keep_blocks(module.student, kept)
            self.rewire(module)
        log.info(
            "%s: the layers that stay are %s of %d", type(self).__name__, kept, len(self._blocks)
        )
        if self._observer is not None:
            self._observer.remove()
            self._observer = None

    def _going(self) -> list[int]:
        if self.layers is not None:
            return self.layers
        assert self._influence is not None and self.amount is not None
        return self._influence.argsort(stable=True)[
            : round(self.amount * len(self._blocks))
        ].tolist()

    def state_dict(self) -> dict[str, Any]:
        pending = (
            {} if self._influence is None or self.reached == 1 else {"influence": self._influence}
        )
        return super().state_dict() | pending

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._influence = state.get("influence")
