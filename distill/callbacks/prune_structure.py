"""Neurons and attention heads: masked on a schedule, then physically removed."""

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.callbacks.base import Compression, compression_config
from distill.compress import importance, structure
from distill.compress.observe import Observer
from distill.compress.structure import Groups
from distill.models.architectures import blocks
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import compression_of
from distill.terms import AttentionRelations

log = logging.getLogger("distill")

LATER = {"low_rank", "sparse", "weights", "activations"}  # what the other stages record


class Structure(Compression):
    """What neurons, heads and layers share: what they refuse, and what follows a removal."""

    stage = "structure"

    def start_over(self, module: Distillation, measured: bool) -> None:
        """Refuse what cannot go well, before anything is measured."""
        trainer, student = module.trainer, module.student
        if any(type(other) is type(self) for other in self.other_techniques(trainer)):
            raise self.error(
                "there are two of these callbacks, but each counts from the whole student: name what goes in one"
            )
        later = compression_of(student.config).keys() & LATER
        if later and not self._seen:
            raise self.error(
                f"the student's config records {', '.join(sorted(later))}, but structure goes first: start from a student without"
            )
        if measured and self.schedule.at(0, trainer.max_steps) > 0:
            raise self.error(
                f"it starts at step 0 of {trainer.max_steps}, but what goes is decided by measuring training batches: start later"
            )

    def rewire(self, module: Distillation) -> None:
        """After a removal: the config says the new form, and optimizer, loss terms and DDP follow."""
        shapes = structure.declare(module.student)
        if shapes or compression_of(module.student.config):
            described = compression_config(module.student)
            described.pop("shapes", None)
            described.update({"shapes": shapes} if shapes else {})
        module.refresh_optimizer_params()

    def check_amount(self, amount: Any) -> None:
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
            raise self.error(f"amount is {amount}, but it must lie in [0, 1): 0.5 removes half")


@dataclass
class Site:
    """One block, and what is known of its groups; counted as at the start, G of them."""

    place: str
    block: nn.Module
    kept: Tensor  # (G,)
    score: Tensor  # gathered since the last change, of the groups that are physically there


class PruneGroups(Structure):
    """Share by share, the groups of each block that matter least; a subclass says what a group is."""

    things: ClassVar[str]
    scores: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        amount: float,
        score: str,
        equal: bool,
        stepwise: bool,
        start: float,
        end: float,
        shape: str,
        every: int,
    ) -> None:
        super().__init__(start, end, shape, every)
        self.check_amount(amount)
        if score not in self.scores:
            raise self.error(
                f"score is {score}, but it must be one of {', '.join(self.scores)}: choose one of them"
            )
        self.amount, self.score, self.equal, self.stepwise = amount, score, equal, stepwise
        self._sites: list[Site] = []
        self._student: PreTrainedModel | None = None
        self._observer: Observer | None = None
        self._saved: dict[str, Any] | None = None

    @abstractmethod
    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        """The groups of a block that are physically there."""

    def prepare(self, module: Distillation) -> None:
        if self.reached == 1:
            return  # resumed after all was removed
        self.start_over(module, measured=self.score != "magnitude")
        self._student = student = module.student
        found = [(block, self._found(student, block)) for block in blocks(student)]
        whole = [torch.ones(groups.count, dtype=torch.bool) for _, groups in found]
        saved = self._saved or {
            "kept": whole,
            "scores": [torch.zeros(groups.count) for _, groups in found],
        }
        self._sites = [
            Site(str(place), block, kept_G.to(student.device), score.to(student.device))
            for place, ((block, _), kept_G, score) in enumerate(
                zip(found, saved["kept"], saved["scores"], strict=True)
            )
        ]
        too_much = importance.explain_excess(
            self.amount, [len(site.kept) for site in self._sites], self.equal
        )
        if too_much:
            raise self.error(
                f"amount is {self.amount:g}, but of the {self.things} that removes {too_much}: take a smaller amount"
            )
        if self.score == "activation":
            layers = {str(place): groups.output.layer for place, (_, groups) in enumerate(found)}
            self._observer = Observer(student, layers, importance.activation)

    def _found(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        with self.prefix_errors():
            return self.groups(student, block)

    def _live(self) -> list[tuple[Site, Groups]]:
        """The sites whose blocks are still there, first to last."""
        assert self._student is not None
        there = {id(block) for block in blocks(self._student)}
        return [
            (site, self.groups(self._student, site.block))
            for site in self._sites
            if id(site.block) in there
        ]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._mask(optimizer)  # gradients of what is masked shall not count when they are clipped
        if self.score == "gradient" and self.reached < 1:
            for site, groups in self._live():
                slope = importance.first_order(groups)
                if slope.isfinite().all():  # else the step is skipped: the loss was scaled too high
                    site.score += slope

    def after_step(self, module: Distillation) -> None:
        if self._observer is not None:
            values = ranks.all_reduce_sum_by_name(
                self._observer.values
            )  # each step, so that a checkpoint holds what all ranks saw
            for site in self._sites:
                site.score += values.get(site.place, 0)
            self._observer.values.clear()
        self._mask(module.trainer.optimizers[0])

    def _mask(self, optimizer: torch.optim.Optimizer) -> None:
        if 0 < self.reached < 1 and not self.stepwise:
            for site, groups in self._live():
                structure.zero(groups, site.kept, optimizer)

    def change(self, module: Distillation, amount: float) -> None:
        live, before = self._live(), [site.kept for site, _ in self._live()]
        scores = [self._scored(site, groups) for site, groups in live]
        select = importance.keep_per_block if self.equal else importance.keep_globally
        for (site, _), kept_G in zip(
            live, select(scores, before, amount * self.amount), strict=True
        ):
            site.kept, site.score = kept_G, torch.zeros_like(site.score)
        if amount == 1 or self.stepwise:
            self._remove(module, live, before)
        self._mask(module.trainer.optimizers[0])
        if amount == 1:
            self._end(live)

    def _scored(self, site: Site, groups: Groups) -> Tensor:
        """A score for each group that there was at the start, (G,)."""
        score = importance.magnitude(groups) if self.score == "magnitude" else site.score
        return torch.zeros(len(site.kept), device=score.device).masked_scatter_(
            self._there(site.kept), score
        )

    def _there(self, kept_G: Tensor) -> Tensor:
        """Which groups are physically there: all until the end, or stepwise those that are kept."""
        return kept_G if self.stepwise else torch.ones_like(kept_G)

    def _remove(
        self, module: Distillation, live: list[tuple[Site, Groups]], before: list[Tensor]
    ) -> None:
        for (site, groups), was_kept_G in zip(live, before, strict=True):
            structure.remove(
                groups, site.kept[self._there(was_kept_G)], module.trainer.optimizers[0]
            )
            site.score = site.score[: site.kept.sum()]
        self.rewire(module)

    def _end(self, live: list[tuple[Site, Groups]]) -> None:
        if self._observer is not None:
            self._observer.remove()
            self._observer = None
        numbers = ", ".join(f"{site.kept.sum()} of {len(site.kept)}" for site, _ in live)
        log.info("%s: %s are left in the blocks: %s", type(self).__name__, self.things, numbers)

    def rank_synced_state(self) -> dict[str, Tensor]:
        return {site.place: site.kept for site in self._sites}

    def state_dict(self) -> dict[str, Any]:
        sites = (
            [site for site, _ in self._live()]
            if self.reached < 1 and self._student is not None
            else []
        )
        return super().state_dict() | {
            "kept": [site.kept for site in sites],
            "scores": [site.score for site in sites],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._saved = state


class PruneNeurons(PruneGroups):
    """Remove this share of the feed-forward networks' neurons: of each block's (`equal`), or of all blocks' by one ranking.

    `score` is what a neuron is kept for: `activation`, mean |a| of what it hands on; `magnitude` of its weights; `gradient`, by how much
    the loss would change without it. With equal widths the result is an ordinary model of its family.
    """

    things = "neurons"
    scores = ("activation", "magnitude", "gradient")

    def __init__(
        self,
        amount: float,
        score: str = "activation",
        equal: bool = True,
        stepwise: bool = False,
        start: float = 0.1,
        end: float = 0.6,
        shape: str = "cubic",
        every: int = 10,
    ) -> None:
        super().__init__(amount, score, equal, stepwise, start, end, shape, every)

    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        return structure.neurons(student, block)


class PruneHeads(PruneGroups):
    """Remove this share of the attention heads: of each block's (`equal`), or of all blocks' by one ranking.

    Query heads that share a key and value head go together with it, and are counted as one. `score` is `gradient`, by how much the loss
    would change without the head, or `magnitude` of its weights.
    """

    things = "heads"
    scores = ("gradient", "magnitude")

    def __init__(
        self,
        amount: float,
        score: str = "gradient",
        equal: bool = True,
        stepwise: bool = False,
        start: float = 0.1,
        end: float = 0.6,
        shape: str = "cubic",
        every: int = 10,
    ) -> None:
        super().__init__(amount, score, equal, stepwise, start, end, shape, every)

    def groups(self, student: PreTrainedModel, block: nn.Module) -> Groups:
        return structure.heads(student, block)

    def prepare(self, module: Distillation) -> None:
        for name, term in module.named_terms():
            if isinstance(term, AttentionRelations):
                raise self.error(
                    f"loss.terms.{name} compares the heads' queries, keys and values, but heads go: leave one of the two out"
                )
        super().prepare(module)
