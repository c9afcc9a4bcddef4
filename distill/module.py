"""batch -> loss: one training step, the optimizer, and what a checkpoint holds.

The student, and the projections of the extra loss terms, are the module's only children. The teacher is kept outside the
module tree, so it is in no checkpoint, optimizer or DDP bucket, and `.train()` does not reach it.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from distill import losses
from distill.compress.restore import restore_structure
from distill.data import is_dummy_batch
from distill.losses import chunked
from distill.models import factored_logits, has_linear_head, logit_rows, logits
from distill.processes import fsdp, ranks
from distill.recipe import config, targets
from distill.tasks.base import Batch, CachedHidden, SparseTargets, Task
from distill.terms import Term


class Distillation(L.LightningModule):
    """alpha * CE + (1 - alpha) * T^2 * divergence + the sum of weight * term, averaged over the rows of each optimizer step."""

    def __init__(
        self,
        task: Task,
        student: PreTrainedModel,
        teacher: PreTrainedModel | nn.Module | None,
        loss: config.Loss,
        optimizer: config.Optimizer,
        steps: int,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.chunked = (
            loss.chunk != 0 and task.selects_positions and has_linear_head(student.eval())
        )
        self.student = student.train()
        self.terms = nn.ModuleDict(
            {name: targets.instantiate(spec) for name, spec in loss.terms.items()}
        )
        self.task, self.loss, self.settings, self.steps = task, loss, optimizer, steps
        self.classes = classes  # columns of the logits that both models share; null: all
        self._whole: tuple[
            Any, ...
        ] = ()  # student and teacher as they were given, while both are split over the ranks
        # a model that answers online, or a head that makes logits of cached hidden states
        self._teacher: tuple[Any, ...] = (
            () if teacher is None else (teacher.eval().requires_grad_(False),)
        )
        self._factors = (
            self.chunked and isinstance(teacher, PreTrainedModel) and has_linear_head(teacher)
        )
        self._divergence = resolve_divergence(task, loss)
        self._parts: dict[str, Tensor] = {}  # of the optimizer step under way
        self._latest: dict[str, Tensor] = {}  # of the last one
        self._outcomes: list[dict[str, Tensor]] = []
        self._attach()

    def _attach(self) -> None:
        """Tap the modules that the models have now."""
        for _, term in self.named_terms():
            term.attach(self.student, self._teacher[0])

    def named_terms(self) -> Iterable[tuple[str, Term]]:
        return cast(Iterable[tuple[str, Term]], self.terms.items())

    def configure_model(self) -> None:
        """Where the strategy asks for it, train a student and ask a teacher that are split over the ranks."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, fsdp.ShardedStrategy) or self._whole:
            return
        mesh = strategy.device_mesh["data_parallel"]
        for _, term in self.named_terms():
            term.detach()
        self._whole = (self.student, *self._teacher)
        self._replace(
            *(
                fsdp.shard(model, mesh) if isinstance(model, PreTrainedModel) else model
                for model in self._whole
            )
        )
        for _, term in self.named_terms():
            fsdp.fully_shard(term, mesh=mesh)
        self._attach()

    def _replace(self, student: PreTrainedModel, *teacher: Any) -> None:
        self.student, self._teacher = student, teacher

    def on_train_start(self) -> None:
        """The rate of the schedule as it is now: a training that goes on for longer than it was to has another."""
        schedule = cast(LambdaLR, self.lr_schedulers())
        for group, base, rate in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * rate(schedule.last_epoch)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_fit_end(self) -> None:
        if self._whole:
            self._replace(*self._whole)
            self._whole = ()
        for teacher in self._teacher:
            teacher.to("cpu")  # where the Trainer leaves the student

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Lightning divides the loss by the micro-batches of a step and DDP the gradients by the ranks: `batch.rows` has done both."""
        with eval_mode(self.student) if is_dummy_batch(batch) else nullcontext():
            parts = self.parts(batch)
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach()
        return parts["loss"] * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one micro-batch by name; summed over the micro-batches of a step they are that step's."""
        teacher, sparse = (
            self._teacher_logits(batch),
            batch.teacher if isinstance(batch.teacher, SparseTargets) else (),
        )
        student = logit_rows(
            self.student, batch.inputs, self._pick(batch), self.classes, self.chunked
        )
        summed = chunked.sum_in_chunks(
            self._sums, student, teacher, (batch.labels, *sparse), self.loss.chunk
        )
        parts = dict(
            zip(("loss", "supervised", "divergence"), summed / max(batch.rows, 1), strict=True)
        )
        for name, term in self.named_terms():
            parts[name] = term(batch)
            parts["loss"] = parts["loss"] + term.weight * parts[name]
        return parts

    def _pick(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda places: self.task.rows(places, batch)

    def _sums(
        self, student_NC: Tensor, teacher_NC: Tensor | None, labels: Tensor, *sparse: Tensor
    ) -> Tensor:
        """Loss, supervised part and divergence, each summed over these rows, (3,)."""
        supervised_N = self.task.supervised(student_NC, labels)
        divergence_N = torch.zeros_like(supervised_N)
        if sparse:
            divergence_N = losses.sparse_kl(student_NC, self.loss.temperature, *sparse)
        elif teacher_NC is not None:
            divergence_N = self._divergence(student_NC, teacher_NC, self.loss.temperature)
        loss_N = losses.distillation(supervised_N, divergence_N, self.loss.alpha)
        return torch.stack([loss_N.sum(), supervised_N.sum(), divergence_N.sum()])

    def _teacher_logits(self, batch: Batch) -> chunked.LogitRows | None:
        """The teacher's rows, (N, C), from the cache or from its forward in its own precision; None where nothing needs all of them."""
        if not self.loss.needs_teacher or isinstance(batch.teacher, SparseTargets):
            return None
        if isinstance(batch.teacher, CachedHidden):
            return factored_logits(batch.teacher.states_ND, self._teacher[0], self.classes)
        if batch.teacher is not None:
            return batch.teacher[:, : self.classes]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return logit_rows(
                self._teacher[0], batch.inputs, self._pick(batch), self.classes, self._factors
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._latest, self._parts = self._parts, {}

    def last_step_losses(self) -> dict[str, Tensor]:
        """The loss of the last optimizer step and its parts, over all ranks, which must all ask; nothing before the first step."""
        if not self._latest:
            return {}
        summed = ranks.all_reduce_sum(
            torch.stack([value.float() for value in self._latest.values()])
        )
        return {f"train/{name}": value for name, value in zip(self._latest, summed, strict=True)}

    def _written(self) -> bool:
        """Whether this optimizer step goes to the loggers."""
        number = self.trainer.global_step + 1
        return number % self.trainer.log_every_n_steps == 0 or number >= self.steps  # type: ignore[attr-defined]

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Clip here: the Trainer's own clipping refuses a fused optimizer under mixed precision, and multiplies where nothing is cut.

        Loggers are told of the step from here too: Lightning's `log` takes milliseconds in every step, for those that nobody writes.
        """
        most, written = self.settings.clip, self._written()
        if most is None and not written:
            return
        parameters = list(self.parameters())
        norm = nn.utils.get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        whole = fsdp.full_tensors(norm)
        if most is not None and (
            whole.is_cuda or not whole <= most
        ):  # a GPU is not asked: it would have to be waited for
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        if written:
            values = self.last_step_losses() | {
                "train/grad_norm": whole,
                "train/lr": optimizer.param_groups[0]["lr"],
            }
            row = {name: float(value) for name, value in values.items()} | {
                "epoch": self.trainer.current_epoch
            }
            for logger in self.trainer.loggers:
                logger.log_metrics(row, self.trainer.global_step)

    def validation_step(self, batch: Batch, index: int) -> None:
        rows_NC = self.task.rows(logits(self.student, batch.inputs), batch)[:, : self.classes]
        if not is_dummy_batch(batch):
            self._outcomes.append(
                {
                    name: column.cpu()
                    for name, column in self.task.outcomes(rows_NC.float(), batch).items()
                }
            )

    def on_validation_epoch_end(self) -> None:
        """The metrics of the whole split on every rank, from its examples in the order in which one process would have seen them."""
        turns = zip_longest(*ranks.all_gather(self._outcomes))  # a rank had every world-th batch
        outcomes = [outcome for turn in turns for outcome in turn if outcome is not None]
        columns = {name: torch.cat([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
        self._outcomes = []
        self.log_dict(
            {f"val/{name}": value for name, value in self.task.quality(columns).items()},
            batch_size=1,
        )
        self.trainer.callback_metrics.update(
            self.last_step_losses()
        )  # for callbacks that decide by them

    def configure_optimizers(self) -> Any:
        settings = self.settings
        fused = (
            self.trainer.precision != "16-mixed"
        )  # a fused optimizer would unscale after the clipping
        optimizer = torch.optim.AdamW(self._groups(), lr=settings.lr, fused=fused)
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        schedule = get_scheduler(name, optimizer, round(settings.warmup * self.steps), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        decayed = [
            parameter
            for parameter in self.parameters()
            if parameter.requires_grad and parameter.ndim > 1
        ]
        kept = [
            parameter
            for parameter in self.parameters()
            if parameter.requires_grad and parameter.ndim <= 1
        ]  # biases and norms
        return [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]

    def refresh_optimizer_params(self) -> None:
        """After parameters or modules were replaced: the optimizer's lists, the taps of the loss terms and DDP's buckets follow.

        A parameter that survives, as itself or as a part, keeps its moments if they were moved to the new parameter before.
        """
        optimizer, groups = self.trainer.optimizers[0], self._groups()
        for group, fresh in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = fresh["params"]  # in the order in which a resumed run would list them
        current = {parameter for group in groups for parameter in group["params"]}
        for gone in optimizer.state.keys() - current:
            del optimizer.state[gone]
        self._attach()
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = strategy._setup_model(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["student_config"] = self.student.config.to_json_string(use_diff=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the student the form that it had, for the weights to fit."""
        restore_structure(self.student, json.loads(checkpoint["student_config"]))
        self._attach()


@contextmanager
def eval_mode(student: nn.Module) -> Iterator[None]:
    """Evaluation mode for an example that does not count: nobody gathers statistics of it."""
    training = [module for module in student.modules() if module.training]
    student.eval()
    yield
    for module in training:
        module.training = True


def resolve_divergence(task: Task, loss: config.Loss) -> Any:
    """The divergence that the recipe names, or else the task's own: (student_NC, teacher_NC, temperature) -> (N,)."""
    name = loss.divergence or task.divergences[0]
    if "." not in name and name not in task.divergences:
        raise config.UserError(
            f"loss.divergence is {name}, but {type(task).__name__} needs one that suits its logits: "
            f"choose from {', '.join(task.divergences)}"
        )
    function = targets.import_object(name if "." in name else f"distill.losses.{name}")
    return (
        partial(function, beta=loss.beta)
        if "beta" in inspect.signature(function).parameters
        else function
    )
