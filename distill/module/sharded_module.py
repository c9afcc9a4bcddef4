"""What several processes divide: with `trainer.strategy=fsdp` sharded copies of both models."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from distill import internals, models
from distill.models import adapters
from distill.module.optimization import OptimizedModule
from distill.processes import fsdp
from distill.recipe import config
from distill.terms import Term


class ShardedModule(OptimizedModule):
    """A module whose student and teacher FSDP can shard; a subclass sets both.

    Args:
        optimizer: learning rate, its schedule, weight decay and gradient clipping.
        steps: optimizer steps of the run; None takes them from the Trainer.
    """

    student: PreTrainedModel
    _teacher: tuple[Any, ...]

    def __init__(self, optimizer: config.Optimizer, steps: int | None) -> None:
        super().__init__(optimizer, steps)
        self._unsharded: tuple[Any, ...] = ()  # student and teacher while FSDP trains copies

    def named_terms(self) -> Iterable[tuple[str, Term]]:
        """The extra loss terms by their names in the recipe."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Replace both models by sharded copies for FSDP; DDP leaves out what is frozen."""
        strategy = self.trainer.strategy
        if frozen := adapters.base_state(self.student):
            internals.leave_out_of_ddp(self, [f"student.{name}" for name in frozen])
        if not isinstance(strategy, fsdp.ShardedStrategy) or self._unsharded:
            return
        mesh = strategy.device_mesh["data_parallel"]
        for _, term in self.named_terms():
            term.detach()
        self._unsharded = (self.student, *self._teacher)
        self._replace_models(
            *(
                fsdp.shard(model, models.blocks, mesh)
                if isinstance(model, PreTrainedModel)
                else model
                for model in self._unsharded
            )
        )
        for _, term in self.named_terms():
            fsdp.fully_shard(term, mesh=mesh)
        self.attach_terms()

    def unshard(self) -> None:
        """Put the models that were sharded back."""
        if self._unsharded:
            self._replace_models(*self._unsharded)
            self._unsharded = ()

    def _replace_models(self, student: PreTrainedModel, *teacher: Any) -> None:
        self.student, self._teacher = student, teacher
