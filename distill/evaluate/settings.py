"""The sections of a recipe that decide how models are measured."""

from dataclasses import dataclass
from typing import Self

from distill.recipe import config


@dataclass(frozen=True)
class MeasureSettings:
    """How models are measured.

    Args:
        evaluate: The recipe's section `evaluate`.
        data: The recipe's section `data`, with the names of the columns.
        trainer: The recipe's section `trainer`: its accelerator, and whether to show progress.
        seed: Draws the bootstrap resamples.
        dtype: Float type in which the models are measured.
    """

    evaluate: config.Evaluate
    data: config.Data
    trainer: config.Trainer
    seed: int
    dtype: str = "float32"

    @classmethod
    def from_run(cls, run: config.Run) -> Self:
        """The settings of a recipe."""
        return cls(run.evaluate, run.data, run.trainer, run.seed, run.export.stored_dtype)
