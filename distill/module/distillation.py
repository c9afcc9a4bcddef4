"""One training step of a student: batch -> logits -> rows -> loss and its parts.

The student and the projections of the extra loss terms are the module's only children. The teacher
is not registered as a submodule, so it is in no checkpoint, optimizer or DDP bucket, and `.train()`
does not change it.

N = rows of logits that count, C = classes or vocabulary.
"""

import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import losses
from distill.compress.restore import restore_structure
from distill.data import batch_from_columns, is_dummy_batch
from distill.errors import UserError
from distill.losses import chunked
from distill.models import blocks, factored_logits, has_linear_head, logit_rows, logits
from distill.module.optimization import OptimizedModule
from distill.processes import fsdp, ranks
from distill.recipe import config, targets
from distill.tasks.base import Task
from distill.tasks.batch import Batch, CachedHidden, SparseTargets
from distill.terms import Term

PARTS = ("loss", "supervised", "divergence")  # parts of the loss, besides the extra terms


class Distillation(OptimizedModule):
    """Trains a student on labels and on the outputs of a frozen teacher.

    The loss is `alpha * CE + (1 - alpha) * T^2 * divergence` plus `weight * term` for each extra
    term, averaged over the rows of an optimizer step.

    Args:
        task: bound to its labels (`task.with_labels`).
        student: the model to train.
        teacher: the model that computes outputs in each step; only its head if batches hold its
            cached hidden states; None if they hold its logits, or the loss needs no teacher.
        loss: alpha, temperature, divergence and extra terms.
        optimizer: learning rate, its schedule, weight decay and gradient clipping.
        steps: optimizer steps of the run; None takes them from the Trainer.

    Attributes:
        classes: number of leading logits that student and teacher share, None for all of them.

    Example::

        module = Distillation(task, student, teacher, Loss(alpha=0.3), Optimizer(lr=1e-4))
        L.Trainer(max_epochs=3).fit(module, DataLoader(examples, 16, collate_fn=collator))
    """

    def __init__(
        self,
        task: Task,
        student: PreTrainedModel,
        teacher: PreTrainedModel | nn.Module | None = None,
        loss: config.Loss | None = None,
        optimizer: config.Optimizer | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(optimizer or config.Optimizer(), steps)
        self.task, self.loss = task, loss or config.Loss()
        self.classes: int | None = None
        self.chunked = (
            self.loss.chunk != 0 and task.selects_positions and has_linear_head(student.eval())
        )
        self.student = student.train()
        self.terms = nn.ModuleDict(
            {name: targets.instantiate(spec) for name, spec in self.loss.terms.items()}
        )
        # A module in a tuple is not registered as a submodule.
        self._teacher: tuple[Any, ...] = (
            () if teacher is None else (teacher.eval().requires_grad_(False),)
        )
        self._unsharded: tuple[Any, ...] = ()  # student and teacher while FSDP trains copies
        self._factored_teacher = (
            self.chunked and isinstance(teacher, PreTrainedModel) and has_linear_head(teacher)
        )
        self._divergence = resolve_divergence(task, self.loss)
        self._outcomes: list[dict[str, Tensor]] = []  # of the current validation run
        self.attach_terms()

    @property
    def teacher(self) -> Any:
        """The frozen teacher, or its head. UserError if there is none."""
        if not self._teacher:
            raise UserError(
                "teacher is None, but the loss needs outputs of a teacher that the batches do not "
                "hold: give a teacher, or set loss.alpha=1"
            )
        return self._teacher[0]

    def named_terms(self) -> Iterable[tuple[str, Term]]:
        """The extra loss terms by their names in the recipe."""
        return cast(Iterable[tuple[str, Term]], self.terms.items())

    def attach_terms(self) -> None:
        """Register the hooks of the loss terms on the current modules."""
        for _, term in self.named_terms():
            term.attach(self.student, self.teacher)

    # ---- one step

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of one micro-batch, for Lightning to differentiate."""
        # A dummy batch adds 0 to the gradient; in eval mode, observers ignore it.
        with eval_mode(self.student) if is_dummy_batch(batch) else nullcontext():
            parts = self.parts(batch)
        self.add_to_step(parts)
        # The loss is already divided by the rows of all micro-batches and ranks, and Lightning and
        # DDP divide by their numbers again.
        return parts["loss"] * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one micro-batch and its parts, by name.

        Their sums over the micro-batches and ranks of an optimizer step are those of the step.
        """
        teacher = self._teacher_logits(batch)
        student = self._logits(self.student, batch, self.chunked)
        sparse = batch.teacher if isinstance(batch.teacher, SparseTargets) else ()
        targets_N = (batch.labels, *sparse)
        if isinstance(student, Tensor):
            teacher_NC = None if teacher is None else chunked.full_logits(teacher)
            sums = self._sum_losses(student, teacher_NC, *targets_N)
        else:  # hidden states and head of a language model
            sums = chunked.sum_in_chunks(
                self._sum_losses, student, teacher, targets_N, self.loss.chunk
            )
        parts = dict(zip(PARTS, sums / max(batch.rows, 1), strict=True))
        for name, term in self.named_terms():
            parts[name] = term(batch)
            parts["loss"] = parts["loss"] + term.weight * parts[name]
        return parts

    def _sum_losses(
        self, student_NC: Tensor, teacher_NC: Tensor | None, labels: Tensor, *sparse: Tensor
    ) -> Tensor:
        """Loss, supervised part and divergence, each summed over these rows, (3,)."""
        supervised_N = self.task.label_loss(student_NC, labels)
        divergence_N = torch.zeros_like(supervised_N)
        if sparse:
            divergence_N = losses.sparse_kl(student_NC, self.loss.temperature, *sparse)
        elif teacher_NC is not None:
            divergence_N = self._divergence(student_NC, teacher_NC, self.loss.temperature)
        loss_N = losses.distillation(supervised_N, divergence_N, self.loss.alpha)
        return torch.stack([loss_N.sum(), supervised_N.sum(), divergence_N.sum()])

    def _teacher_logits(self, batch: Batch) -> chunked.LogitRows | None:
        """The teacher's rows, (N, C), cached or computed; None if the loss does not need them."""
        if not self.loss.needs_teacher or isinstance(batch.teacher, SparseTargets):
            return None
        if isinstance(batch.teacher, CachedHidden):
            return factored_logits(batch.teacher.states_ND, self.teacher, self.classes)
        if batch.teacher is not None:
            return batch.teacher[:, : self.classes]
        # The teacher computes in the dtype of its weights, whatever the Trainer's precision.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._logits(self.teacher, batch, self._factored_teacher)

    def _logits(self, model: Any, batch: Batch, factored: bool) -> chunked.LogitRows:
        """The rows of a model's logits that enter the loss, (N, C), or their factors."""
        return logit_rows(
            model,
            batch.inputs,
            lambda positions: self.task.select_rows(positions, batch),
            self.classes,
            factored,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Convert a batch of a user's data loader, a dictionary of tensors, to a :class:`Batch`."""
        if isinstance(batch, Batch):
            return batch
        converted = batch_from_columns(batch, self.task, self.student.config.pad_token_id or 0)
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return converted._replace(rows=converted.rows * parts, tokens=converted.tokens * parts)

    # ---- validation

    def validation_step(self, batch: Batch, index: int) -> None:
        rows_NC = self.task.select_rows(logits(self.student, batch.inputs), batch)[
            :, : self.classes
        ]
        if not is_dummy_batch(batch):
            outcomes = self.task.outcomes(rows_NC.float(), batch)
            self._outcomes.append({name: column.cpu() for name, column in outcomes.items()})

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of the split, over the examples of all ranks in dataset order."""
        # A rank evaluates every world-th batch.
        rounds = zip_longest(*ranks.all_gather(self._outcomes))
        outcomes = [outcome for batches in rounds for outcome in batches if outcome is not None]
        columns = {name: torch.cat([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
        self._outcomes = []
        metrics = self.task.compute_metrics(columns)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=1)
        # Callbacks may monitor a training loss.
        self.trainer.callback_metrics.update(self.last_step_losses())

    # ---- start, end and checkpoints

    def configure_model(self) -> None:
        """With FSDP, replace student and teacher by sharded copies."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, fsdp.ShardedStrategy) or self._unsharded:
            return
        mesh = strategy.device_mesh["data_parallel"]
        for _, term in self.named_terms():
            term.detach()
        self._unsharded = (self.student, *self._teacher)
        self._replace_models(
            *(
                fsdp.shard(model, blocks, mesh) if isinstance(model, PreTrainedModel) else model
                for model in self._unsharded
            )
        )
        for _, term in self.named_terms():
            fsdp.fully_shard(term, mesh=mesh)
        self.attach_terms()

    def _replace_models(self, student: PreTrainedModel, *teacher: Any) -> None:
        self.student, self._teacher = student, teacher

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_fit_end(self) -> None:
        if self._unsharded:
            self._replace_models(*self._unsharded)
            self._unsharded = ()
        for teacher in self._teacher:
            teacher.to("cpu")  # where the Trainer leaves the student

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["student_config"] = self.student.config.to_json_string(use_diff=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the structure of a compressed student before its weights are loaded."""
        restore_structure(self.student, json.loads(checkpoint["student_config"]))
        self.attach_terms()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode inside the context, then restore each module's training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    yield
    for module in training:
        module.training = True


def resolve_divergence(task: Task, loss: config.Loss) -> Any:
    """The divergence of the recipe, by default the task's first.

    Returns:
        A function (student_NC, teacher_NC, temperature) -> divergence_N.

    Raises:
        UserError: if the divergence is not for the task's kind of logits.
    """
    name = loss.divergence or task.divergences[0]
    if "." not in name and name not in task.divergences:
        raise UserError(
            f"loss.divergence is {name}, but {type(task).__name__} needs one that suits its "
            f"logits: choose from {', '.join(task.divergences)}"
        )
    function = targets.import_object(name if "." in name else f"distill.losses.{name}")
    has_beta = "beta" in inspect.signature(function).parameters
    return partial(function, beta=loss.beta) if has_beta else function
