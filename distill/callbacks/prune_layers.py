"""Removal of transformer blocks at one step."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.callbacks.structure_base import PruneStructure
from distill.compress import importance, proofs, structure
from distill.compress.observe import Observer
from distill.models.families import blocks
from distill.models.layer_proof import shorten_config
from distill.module import Distillation
from distill.processes import ranks
from distill.terms import AttentionRelations, HiddenStates

__all__ = ["PruneLayers"]

log = logging.getLogger("distill")


class PruneLayers(PruneStructure):
    """Removes transformer blocks at `start`.

    Args:
        layers: positions of the blocks to remove, from 0, in the student before training.
        amount: in place of `layers`, the share of blocks to remove, in [0, 1): those that changed
            the hidden states least before `start` (Men et al. 2024).
        start: when they are removed: a share of the training, or ``"500 steps"``.

    Raises:
        UserError: if an argument is out of range, or not exactly one of the first two is set.

    Example::

        callbacks:
          layers: {_target_: distill.callbacks.PruneLayers, amount: 0.5}
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        amount: float | None = None,
        start: float | str = 0.1,
    ) -> None:
        super().__init__(start, start, "one_shot", 1)
        if (layers is None) == (amount is None):
            raise self.error(
                f"layers is {layers} and amount is {amount}, but exactly one of them must be "
                "given: leave one out"
            )
        if layers is not None and not isinstance(layers, list):
            raise self.error(
                f"layers is {layers}, but it must be a list of layers, counted from 0: "
                "[0, 2] removes two"
            )
        if amount is not None:
            self.check_amount(amount)
        self.layers, self.amount = layers, amount
        self._blocks: list[nn.Module] = []
        self._influence: Tensor | None = None  # influence of each block, summed over tokens
        self._observer: Observer | None = None

    def prepare(self, module: Distillation) -> None:
        if self.progress == 1:
            return
        self.check_start(module, measured=self.amount is not None)
        student = module.student
        self._blocks = list(blocks(student))
        self._check_layers(student)
        self._check_terms(module)
        if self.amount is not None:
            self._observer = importance.BlockInfluence(student)
            if self._influence is None:
                self._influence = torch.zeros(len(self._blocks))
            self._influence = self._influence.to(student.device)

    def _check_layers(self, student: PreTrainedModel) -> None:
        count = len(self._blocks)
        with self.prefix_errors():
            proofs.check_separate_layers(student.config)
        for layer in self.layers or ():
            if not (isinstance(layer, int) and 0 <= layer < count):
                raise self.error(
                    f"layers has {layer}, but the student has {count} layers: "
                    f"name layers from 0 to {count - 1}"
                )
        amount = self.amount or 0
        removed = round(amount * count) if self.layers is None else len(set(self.layers))
        if removed >= count:
            key = f"amount is {amount:g}" if self.layers is None else f"layers is {self.layers}"
            raise self.error(
                f"{key}, but that removes all {count} layers of the student: keep at least one"
            )

        if removed:
            with self.prefix_errors():
                for tried in [{0}, {count - 1}] if self.layers is None else [{*self.layers}]:
                    remaining = [layer for layer in range(count) if layer not in tried]
                    shorten_config(student.config, remaining)

    def _check_terms(self, module: Distillation) -> None:
        first = min(self.layers or [0]) if self.amount is None else 0
        for name, term in module.named_terms():
            layers: list[int] = []
            if isinstance(term, HiddenStates):
                layers = list(term.layers)
            elif isinstance(term, AttentionRelations):
                layers = [term.student_layer]
            for layer in layers:
                if layer >= first:
                    raise self.error(
                        f"loss.terms.{name} names layer {layer} of the student, but layers from "
                        f"{first} on are removed or change their positions: name one before them, "
                        "or select layers by student.layers instead"
                    )

    def after_step(self, module: Distillation) -> None:
        if self._observer is not None and self._influence is not None:
            values = ranks.all_reduce_sum_by_name(self._observer.values)
            positions = range(len(self._blocks))
            self._influence += torch.stack([values[str(position)] for position in positions])
            self._observer.values.clear()

    def change(self, module: Distillation, amount: float) -> None:
        removed = self._layers_to_remove()
        remaining = [position for position in range(len(self._blocks)) if position not in removed]
        if len(remaining) < len(self._blocks):
            structure.keep_blocks(module.student, remaining)
            self.refresh(module)
        log.info("PruneLayers: kept layers %s of %d", remaining, len(self._blocks))
        if self._observer is not None:
            self._observer.remove()
            self._observer = None

    def _layers_to_remove(self) -> list[int]:
        if self.layers is not None:
            return self.layers
        assert self._influence is not None and self.amount is not None
        count = round(self.amount * len(self._blocks))
        return self._influence.argsort(stable=True)[:count].tolist()

    def state_dict(self) -> dict[str, Any]:
        unfinished = self._influence is not None and self.progress < 1
        return super().state_dict() | ({"influence": self._influence} if unfinished else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._influence = state.get("influence")
