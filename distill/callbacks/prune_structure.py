"""Pruning of neurons and attention heads: masked on a schedule, then removed.

Shapes: G = groups of a block (its neurons, or its heads).
"""

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.callbacks.structure_base import PruneStructure
from distill.compress import importance, proofs, structure
from distill.compress.observe import Observer
from distill.compress.structure import Groups
from distill.models.families import blocks
from distill.module import Distillation
from distill.processes import ranks
from distill.terms import AttentionRelations

__all__ = ["PruneGroups", "PruneHeads", "PruneNeurons"]

log = logging.getLogger("distill")


@dataclass
class BlockState:
    """The pruning state of one block.

    Args:
        position: position of the block in the student before training, as text.
        block: the module.
        mask: (G,), over the groups of the student before training: False where one is pruned.
        score: importance since the last change, of the groups that have not been removed.
    """

    position: str
    block: nn.Module
    mask: Tensor
    score: Tensor


class PruneGroups(PruneStructure):
    """Removes the least important groups of each block, step by step.

    Until the end of the schedule, groups are masked: their weights are set to zero after each step.
    They are removed at its end, or after each change if `stepwise`.

    Args:
        amount: share of the groups to remove, in [0, 1).
        score: measure of importance; one of `score_names`, by default the first.
        equal: whether each block loses the same share; else the groups of all blocks are ranked
            together.
        stepwise: whether groups are removed at each change instead of being masked until the end.
        start: when pruning begins: a share of the training, or ``"500 steps"``.
        end: when `amount` is reached, likewise.
        shape: shape of the schedule: ``cubic``, ``linear`` or ``one_shot``.
        every: optimizer steps between two changes.

    Raises:
        UserError: if an argument is out of range.
    """

    group_name: ClassVar[str]
    """Plural name of the groups, for messages."""
    score_names: ClassVar[tuple[str, ...]]
    """Values of `score`."""

    def __init__(
        self,
        amount: float,
        score: str | None = None,
        equal: bool = True,
        stepwise: bool = False,
        start: float | str = 0.1,
        end: float | str = 0.6,
        shape: str = "cubic",
        every: int = 10,
    ) -> None:
        super().__init__(start, end, shape, every)
        self.check_amount(amount)
        score = self.score_names[0] if score is None else score
        if score not in self.score_names:
            choices = ", ".join(self.score_names)
            raise self.error(f"score is {score}, but it must be one of {choices}: choose one")
        self.amount, self.score, self.equal, self.stepwise = amount, score, equal, stepwise
        self._states: list[BlockState] = []
        self._student: PreTrainedModel | None = None
        self._observer: Observer | None = None
        self._loaded: dict[str, Any] | None = None

    @abstractmethod
    def check_family(self, config: PreTrainedConfig) -> None:
        """UserError if removing groups does not equal masking them for models of a config."""

    @abstractmethod
    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        """The groups of a block that have not been removed."""

    def prepare(self, module: Distillation) -> None:
        if self.progress == 1:
            return  # resumed after the groups were removed
        self.check_start(module, measured=self.score != "magnitude")
        self._student = student = module.student
        with self.prefix_errors():
            self.check_family(student.config)
            all_groups = [self.groups(student, block) for block in blocks(student)]
        self._states = self._initial_states(student, [groups.count for groups in all_groups])
        counts = [len(state.mask) for state in self._states]
        if excess := importance.explain_excess(self.amount, counts, self.equal):
            raise self.error(
                f"amount is {self.amount:g}, but of the {self.group_name} that removes {excess}: "
                "take a smaller amount"
            )
        if self.score == "activation":
            layers = {str(index): groups.output.layer for index, groups in enumerate(all_groups)}
            self._observer = Observer(student, layers, importance.activation_sum)

    def _initial_states(self, student: PreTrainedModel, counts: list[int]) -> list[BlockState]:
        loaded = self._loaded or {
            "masks": [torch.ones(count, dtype=torch.bool) for count in counts],
            "scores": [torch.zeros(count) for count in counts],
        }
        parts = zip(blocks(student), loaded["masks"], loaded["scores"], strict=True)
        return [
            BlockState(str(index), block, kept_G.to(student.device), score.to(student.device))
            for index, (block, kept_G, score) in enumerate(parts)
        ]

    def _present(self) -> list[tuple[BlockState, Groups]]:
        """State and groups of each block that no other technique has removed."""
        assert self._student is not None
        present = {id(block) for block in blocks(self._student)}
        return [
            (state, self.groups(self._student, state.block))
            for state in self._states
            if id(state.block) in present
        ]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._mask(optimizer)  # gradients of masked groups must not count in gradient clipping
        if self.score == "gradient" and self.progress < 1:
            for state, groups in self._present():
                change = importance.first_order(groups)
                if change.isfinite().all():  # else the fp16 loss scaler skips the step
                    state.score += change

    def after_step(self, module: Distillation) -> None:
        if self._observer is not None:  # in each step: only rank zero writes the checkpoint
            values = ranks.all_reduce_sum_by_name(self._observer.values)
            for state in self._states:
                state.score += values.get(state.position, 0)
            self._observer.values.clear()
        self._mask(module.trainer.optimizers[0])

    def _mask(self, optimizer: torch.optim.Optimizer) -> None:
        if 0 < self.progress < 1 and not self.stepwise:
            for state, groups in self._present():
                structure.zero_groups(groups, state.mask, optimizer)

    def change(self, module: Distillation, amount: float) -> None:
        present = self._present()
        kept_before = [state.mask for state, _ in present]
        scores = [self._full_score(state, groups) for state, groups in present]
        select = importance.keep_per_block if self.equal else importance.keep_globally
        masks = select(scores, kept_before, amount * self.amount)
        for (state, _), kept_G in zip(present, masks, strict=True):
            state.mask, state.score = kept_G, torch.zeros_like(state.score)
        if amount == 1 or self.stepwise:
            self._remove(module, present, kept_before)
        self._mask(module.trainer.optimizers[0])
        if amount == 1:
            self._end(present)

    def _full_score(self, state: BlockState, groups: Groups) -> Tensor:
        """A score for each group of the student before training, (G,); 0 if it was removed."""
        score = importance.magnitude(groups) if self.score == "magnitude" else state.score
        full_G = torch.zeros(len(state.mask), device=score.device)
        return full_G.masked_scatter_(self._not_removed(state.mask), score)

    def _not_removed(self, kept_G: Tensor) -> Tensor:
        """Mask of the groups that have parameters: until the end all, unless `stepwise`."""
        return kept_G if self.stepwise else torch.ones_like(kept_G)

    def _remove(
        self,
        module: Distillation,
        present: list[tuple[BlockState, Groups]],
        kept_before: list[Tensor],
    ) -> None:
        optimizer = module.trainer.optimizers[0]
        for (state, groups), before_G in zip(present, kept_before, strict=True):
            structure.remove_groups(groups, state.mask[self._not_removed(before_G)], optimizer)
            state.score = state.score[: state.mask.sum()]
        self.refresh(module)

    def _end(self, present: list[tuple[BlockState, Groups]]) -> None:
        if self._observer is not None:
            self._observer.remove()
            self._observer = None
        counts = ", ".join(f"{state.mask.sum()} of {len(state.mask)}" for state, _ in present)
        log.info("%s: %s kept in each block: %s", type(self).__name__, self.group_name, counts)

    def rank_synced_state(self) -> dict[str, Tensor]:
        return {state.position: state.mask for state in self._states}

    def state_dict(self) -> dict[str, Any]:
        unfinished = self.progress < 1 and self._student is not None
        states = [state for state, _ in self._present()] if unfinished else []
        return super().state_dict() | {
            "masks": [state.mask for state in states],
            "scores": [state.score for state in states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._loaded = state


class PruneNeurons(PruneGroups):
    """Removes a share of the neurons of the feed-forward networks.

    With `equal` the result is an ordinary model of its family with a smaller feed-forward size.

    The arguments are those of :class:`PruneGroups`. `score` is ``activation`` (mean |a| of the
    neuron's output), ``magnitude`` (norm of its weights) or ``gradient`` (first-order estimate of
    the change of the loss without it).

    Example::

        callbacks:
          neurons: {_target_: distill.callbacks.PruneNeurons, amount: 0.5}
    """

    group_name = "neurons"
    score_names = ("activation", "magnitude", "gradient")

    def check_family(self, config: PreTrainedConfig) -> None:
        proofs.check_structure(config, ["neurons"], self.amount)

    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        return structure.neurons(student, block)

    def final_width(self, student: PreTrainedModel) -> int | None:
        if self.progress == 1:
            return None
        count = structure.neurons(student, blocks(student)[0]).count
        return count - round(self.amount * count) if self.equal else -1


class PruneHeads(PruneGroups):
    """Removes a share of the attention heads.

    Query heads that share a key and value head are removed together with it, and count as one.

    The arguments are those of :class:`PruneGroups`. `score` is ``gradient`` (first-order estimate
    of the change of the loss without the head) or ``magnitude`` (norm of its weights).

    Example::

        callbacks:
          heads: {_target_: distill.callbacks.PruneHeads, amount: 0.25}
    """

    group_name = "heads"
    score_names = ("gradient", "magnitude")

    def check_family(self, config: PreTrainedConfig) -> None:
        technique = "heads" if self.equal else "unequal_heads"
        proofs.check_structure(config, [technique], self.amount)

    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        return structure.heads(student, block)

    def prepare(self, module: Distillation) -> None:
        for name, term in module.named_terms():
            if isinstance(term, AttentionRelations):
                raise self.error(
                    f"loss.terms.{name} compares queries, keys and values of all heads, but heads "
                    "are removed: leave one of the two out"
                )
        super().prepare(module)
