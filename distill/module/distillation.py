"""One training step of a student: batch -> logits -> rows -> loss and its parts.

Only the student and the projections of the extra loss terms have a state. The teacher is no
submodule, so it is in no checkpoint, optimizer or DDP bucket, and `.train()` does not change it.

N = rows of logits that count, C = classes or vocabulary.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import losses, models
from distill.data import batch_from_columns, is_dummy_batch
from distill.errors import UserError
from distill.losses import chunked, fused
from distill.models.adapters import BaseTeacher, without_adapter
from distill.module import student_state
from distill.module.label_loss import LabelLoss
from distill.module.loss_functions import resolve_divergence, term_value
from distill.module.sharded_module import ShardedModule
from distill.module.span_losses import sum_span_losses
from distill.module.step_losses import peak
from distill.processes import ranks
from distill.recipe import config, targets
from distill.tasks.base import Task
from distill.tasks.batch import Batch, CachedHidden, FewTokens
from distill.terms import Term

PARTS = ("loss", "supervised", "divergence")  # parts of the loss, besides the extra terms


class Distillation(ShardedModule):
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
            self.loss.chunk != 0
            and task.selects_positions
            and models.has_linear_head(student.eval())
        )
        self.student = student.train()
        base: Any = Term  # abstract, which mypy refuses where a class is expected
        self.terms = nn.ModuleDict(
            {
                name: targets.instantiate(f"loss.terms.{name}", spec, base)
                for name, spec in self.loss.terms.items()
            }
        )
        # A module in a tuple is not registered as a submodule.
        self._teacher: tuple[Any, ...] = (
            () if teacher is None else (teacher.eval().requires_grad_(False),)
        )
        self._factored_teacher = (
            self.chunked
            and isinstance(teacher, PreTrainedModel)
            and models.has_linear_head(teacher)
        )
        self.label_loss = LabelLoss(task, self.loss.class_weights)
        self._divergence = resolve_divergence(task, self.loss)
        label_loss = task.label_loss if self.label_loss.weights_C is None else self.label_loss
        self._fused = fused.recognize(
            label_loss, self._divergence, self.loss.alpha, self.loss.temperature
        )
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

    def models(self) -> list[Any]:
        """The student, and its teacher or the teacher's head, if there is one."""
        return [self.student, *self._teacher]

    def custom_part(self, part: str) -> str | None:
        key, path = f"loss.{part}", self.loss.divergence if part == "divergence" else None
        if part in self.loss.terms:
            key, path = f"loss.terms.{part}", self.loss.terms[part]["_target_"]
        is_custom = path is not None and "." in path and not path.startswith("distill.")
        return f"{key} is {path}" if is_custom else None

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
        with models.eval_mode(self.student) if is_dummy_batch(batch) else nullcontext():
            parts, peaks = self._parts_and_peaks(batch)
        self.step_losses.add(parts, peaks, self.trainer.global_step + 1)
        # Lightning and DDP divide again by the numbers of micro-batches and ranks.
        divided = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return parts["loss"] if divided == 1 else parts["loss"] * divided

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one micro-batch and its parts, by name.

        Their sums over the micro-batches and ranks of an optimizer step are those of the step.
        """
        return self._parts_and_peaks(batch)[0]

    def _parts_and_peaks(self, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The parts of the loss, and the largest logits of student and teacher."""
        if self._compiled is not None:
            sums, *peaks = self._compiled(batch.without_numbers())
        else:
            sums, *peaks = self._sums_and_peaks(batch)
        parts = dict(zip(PARTS, (sums / max(batch.rows, 1)).unbind(), strict=True))
        for name, term in self.named_terms():
            parts[name] = term_value(name, term, batch)
            parts["loss"] = parts["loss"] + term.weight * parts[name]
        return parts, peaks

    def _sums_and_peaks(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the loss summed over the rows, the largest logits of student and teacher."""
        teacher = self._teacher_logits(batch)
        student = self._logits(self.student, batch, self.chunked and batch.spans is None)
        sparse = batch.teacher if isinstance(batch.teacher, FewTokens) else ()
        targets_N = (batch.labels, *sparse)
        if batch.spans is not None and teacher is not None:
            functions = (self.label_loss, self._divergence)
            sums = sum_span_losses((student, teacher), batch, *functions, self.loss)
        elif isinstance(student, Tensor):
            teacher_NC = None if teacher is None else chunked.full_logits(teacher)
            sums = self._sum_losses(student, teacher_NC, *targets_N)
        else:  # hidden states and head of a language model
            kernel = None if sparse else self._fused
            sums = chunked.sum_in_chunks(
                self._sum_losses, student, teacher, targets_N, self.loss.chunk, kernel
            )
        return sums, peak(student, sums), peak(teacher, sums)

    def compile_step(self) -> bool:
        """Compile forwards and loss as one graph, if logits are few and models have no hooks."""
        # The product of a language model's head is replaced in each step (`logit_rows`).
        language_model = self.student.get_output_embeddings() is not None
        if self.chunked or language_model or self.terms or self.trainer.world_size > 1:
            return False
        graphs = self.device.type == "cuda" and self.trainer.accumulate_grad_batches == 1
        mode = "reduce-overhead" if graphs else None
        self._compiled = torch.compile(self._sums_and_peaks, mode=mode)
        return True

    def _sum_losses(
        self, student_NC: Tensor, teacher_NC: Tensor | None, labels: Tensor, *sparse: Tensor
    ) -> Tensor:
        """Loss, supervised part and divergence, each summed over these rows, (3,)."""
        supervised_N = self.label_loss(student_NC, labels)
        if sparse:
            divergence_N = losses.sparse_kl(student_NC, self.loss.temperature, *sparse)
        elif teacher_NC is not None:
            divergence_N = self._divergence(student_NC, teacher_NC, self.loss.temperature)
        else:
            divergence_N = torch.zeros_like(supervised_N)
        loss_N = losses.distillation(supervised_N, divergence_N, self.loss.alpha)
        return torch.stack([loss_N.sum(), supervised_N.sum(), divergence_N.sum()])

    def _teacher_logits(self, batch: Batch) -> chunked.LogitRows | None:
        """The teacher's rows, (N, C), cached or computed; None if the loss does not need them."""
        if not self.loss.needs_teacher or isinstance(batch.teacher, FewTokens):
            return None
        if isinstance(batch.teacher, CachedHidden):
            return models.factored_logits(batch.teacher.states_ND, self.teacher, self.classes)
        if batch.teacher is not None:
            return batch.teacher[:, : self.classes]
        if isinstance(self.teacher, BaseTeacher):
            with torch.no_grad(), models.eval_mode(self.student), without_adapter(self.student):
                return self._logits(self.student, batch.for_teacher(), self.chunked)
        # The teacher computes in the dtype of its weights, whatever the Trainer's precision.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._logits(self.teacher, batch.for_teacher(), self._factored_teacher)

    def _logits(self, model: Any, batch: Batch, factored: bool) -> chunked.LogitRows:
        """The rows of a model's logits that enter the loss, (N, C), or their factors."""
        with models.batch_inputs(model, batch) as inputs:
            return models.logit_rows(
                model,
                inputs,
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
        select = partial(self.task.select_rows, batch=batch)
        rows = models.evaluated_rows(self.student, batch.inputs, select, self.chunked)
        if not is_dummy_batch(batch):
            outcomes = self.task.outcomes_of(rows, batch, self.classes)
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

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_fit_end(self) -> None:
        self._compiled = None
        self.unshard()
        for teacher in self._teacher:
            teacher.to("cpu")  # where the Trainer leaves the student

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        student_state.write(self.student, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the structure of a compressed student before its weights are loaded."""
        student_state.restore(self.student, checkpoint)
        self.attach_terms()
