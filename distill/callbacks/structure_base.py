"""The base class of the removal of neurons, attention heads and layers."""

from typing import Any

from distill.callbacks.compression import Compression
from distill.compress import widths
from distill.module import Distillation
from distill.remote_code.modeling import CompressionConfig

__all__ = ["PruneStructure"]

_LATER_STAGES = ("low_rank", "sparse", "weights", "activations")  # fields of CompressionConfig


class PruneStructure(Compression):
    """Base class of the techniques that remove parts of the student."""

    stage = "structure"

    def check_start(self, module: Distillation, measured: bool) -> None:
        """Check that the student can be pruned, before anything is measured.

        Args:
            module: the module before its first step, or resumed.
            measured: whether importance is measured on training batches.

        Raises:
            UserError: if the student cannot be pruned.
        """
        trainer, config = module.trainer, module.student.config
        if any(type(other) is type(self) for other in self.other_techniques(trainer)):
            raise self.error(
                "there are two of these callbacks, but each counts from the full student: use one"
            )
        compression = CompressionConfig.from_config(config)
        later = [part for part in _LATER_STAGES if getattr(compression, part)]
        if later and not self._last_step:
            raise self.error(
                f"the student has {', '.join(sorted(later))} in config.compression, but structure "
                "must be pruned first: start from another student"
            )
        if measured and self.schedule.at(0, trainer.max_steps) > 0:
            raise self.error(
                f"it starts at step 0 of {trainer.max_steps}, but it needs statistics of training "
                "batches: start later"
            )

    def check_amount(self, amount: Any) -> None:
        """Raise UserError if `amount` is not a share in [0, 1)."""
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
            raise self.error(f"amount is {amount}, but it must lie in [0, 1): 0.5 removes half")

    def refresh(self, module: Distillation) -> None:
        """Update the config, the optimizer, the loss terms and DDP after a removal."""
        config = module.student.config
        shapes = widths.update_config(module.student)
        attributes = widths.head_attributes(module.student, shapes)
        compression = CompressionConfig.from_config(config)
        if (compression.shapes, compression.attributes) != (shapes, attributes):
            compression.shapes, compression.attributes = shapes, attributes
            compression.write_to(config)
        module.refresh_optimizer_params()
