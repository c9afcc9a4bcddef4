"""The optimizer of a module: parameter groups, schedule, gradient clipping, logging of steps."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from distill import internals
from distill.errors import RunFailed
from distill.module.low_bit_optimizer import adamw_8bit, set_lr
from distill.module.step_losses import TEACHER, StepLosses
from distill.processes import fsdp
from distill.recipe import config
from distill.recipe.validation import check_fused


class OptimizedModule(L.LightningModule):
    """AdamW with a schedule over `steps`, clipping, and losses summed over micro-batches.

    Args:
        optimizer: learning rate, its schedule, weight decay and gradient clipping.
        steps: optimizer steps of the run; None takes them from the Trainer.
    """

    loss: config.Loss

    def __init__(self, optimizer: config.Optimizer, steps: int | None) -> None:
        super().__init__()
        self.settings, self.steps = optimizer, steps or 0
        self.rate_key = "optimizer.lr"  # the learning rate's key in the recipe
        self.step_losses = StepLosses()
        self._gradient_norm = torch.zeros(())
        self._compiled: Any = None  # losses of a batch as one graph
        self._parameters_in_order: list[nn.Parameter] = []

    def setup(self, stage: str) -> None:
        if not self.steps and stage == "fit":
            self.steps = int(self.trainer.estimated_stepping_batches)
            internals.limit_steps(self.trainer, self.steps)

    def attach_terms(self) -> None:
        """Register the hooks of loss terms again; called after modules were replaced."""

    def custom_part(self, part: str) -> str | None:
        """The key and dotted path of a part of the loss that is no code of distill."""
        return None

    # ---- losses and logging

    def last_step_losses(self) -> dict[str, Tensor]:
        """The losses of the last optimizer step, summed over all ranks, which must all call it.

        Empty before the first step.
        """
        return self.step_losses.last_step()

    def check_finite(self) -> None:
        """Check the losses of all steps since the last check; all ranks must call it.

        Raises:
            RunFailed: if one was not finite, with the step, and the part that caused it.
        """
        first = self.step_losses.first_not_finite()
        if first is None or self.trainer.precision == "16-mixed":
            return  # the gradient scaler of float16 skips such steps
        name = f"the {first.part} of step {first.step} became {first.value:g}"
        if first.part == TEACHER:
            raise RunFailed(
                f"{name}, but a student can only learn finite ones: set teacher.dtype=float32, or "
                "choose another teacher"
            )
        path = self.custom_part(first.part)
        if path is not None:
            raise RunFailed(
                f"{path}, but {name} for finite logits: correct it, or lower {self.rate_key}"
            )
        raise RunFailed(
            f"{self.rate_key} is {self.settings.lr:g}, but with it the training diverged "
            f"({name}): lower {self.rate_key}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the gradient norm and log the step.

        Loggers are called directly, and only every `log_every_n_steps`, because Lightning's `log`
        costs milliseconds in every step.
        """
        self.step_losses.end_step()
        logged = self._is_logged()
        if self.settings.clip is None and not logged:
            return
        if not self._parameters_in_order:  # listing them takes a millisecond
            self._parameters_in_order = list(self.parameters())
        gradients = [each.grad for each in self._parameters_in_order if each.grad is not None]
        self._gradient_norm = nn.utils.get_total_norm(gradients)
        if logged:
            self._log_step(optimizer)

    def _is_logged(self) -> bool:
        number = self.trainer.global_step + 1
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return number % interval == 0 or number >= self.steps

    def _log_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.check_finite()
        values = self.last_step_losses() | {
            "train/grad_norm": fsdp.full_tensors(self._gradient_norm),
            "train/lr": optimizer.param_groups[0]["lr"],
        }
        row = {name: float(value) for name, value in values.items()}
        row["epoch"] = self.trainer.current_epoch
        for logger in self.trainer.loggers:
            logger.log_metrics(row, self.trainer.global_step)

    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._compiled is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_end(self, *_: Any) -> None:
        # A CUDA graph that starts again overwrites its outputs, the gradients among them.
        if self._compiled is not None and self.step_losses.complete:
            self.trainer.optimizers[0].zero_grad()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Clip the gradient's norm to `optimizer.clip`.

        The Trainer's clipping refuses a fused optimizer under mixed precision, and multiplies
        gradients even if their norm is below the limit.
        """
        limit = self.settings.clip
        if limit is None:
            return
        norm = fsdp.full_tensors(self._gradient_norm)
        # On a GPU, comparing the norm is a CPU-GPU sync point.
        if norm.is_cuda or not norm.numpy() <= limit:
            nn.utils.clip_grads_with_norm_(self._parameters_in_order, limit, self._gradient_norm)

    # ---- optimizer and schedule

    def configure_optimizers(self) -> Any:
        settings = self.settings
        fused, groups = settings.fused, self._parameter_groups()
        check_fused(fused, str(self.trainer.precision))
        if fused is None:
            fused = self.trainer.precision != "16-mixed"
        optimizer: torch.optim.Optimizer
        if settings.bits == 8:
            optimizer = adamw_8bit(groups, settings.lr)
        else:
            optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        schedule = get_scheduler(name, optimizer, round(settings.warmup * self.steps), self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the learning rate of the schedule, which a resumed run with more steps changes."""
        self._parameters_in_order = []
        schedule = cast(LambdaLR, self.lr_schedulers())
        for group, base, rate in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            set_lr(group, float(base) * rate(schedule.last_epoch))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors (biases and norms) without."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def refresh_optimizer_params(self) -> None:
        """Update the optimizer, the hooks of loss terms and DDP after parameters were replaced.

        The moments of a new parameter must be in the optimizer's state already.
        """
        optimizer, groups = self.trainer.optimizers[0], self._parameter_groups()
        for group, new in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = new["params"]  # in the order of a resumed run
        current = {parameter for group in groups for parameter in group["params"]}
        for removed in optimizer.state.keys() - current:
            del optimizer.state[removed]
        self._parameters_in_order = []
        self.attach_terms()
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            internals.rewrap_ddp(strategy, self)
