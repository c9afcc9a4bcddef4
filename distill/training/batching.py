"""How training batches are made, from the sections `data` and `trainer` of a recipe."""

import math

from distill.data import Batching
from distill.models import resolve_device
from distill.processes import ranks
from distill.recipe import config


def training_batching(
    settings: config.Data, trainer: config.Trainer, longest: int, seed: int
) -> Batching:
    """How training batches are made.

    Args:
        settings: the recipe's section `data`.
        trainer: the recipe's section `trainer`.
        longest: tokens of the longest example.
        seed: shuffles the examples.
    """
    multiple = settings.pad_to_multiple_of
    if multiple is None and trainer.compile:  # each length may need a graph of its own
        multiple = 8 * math.ceil(longest / 64)
    return Batching(
        settings.batch_size,
        accumulate=trainer.accumulate,
        seed=seed,
        group_by_length=settings.group_by_length,
        rank=ranks.rank(),
        world=ranks.world_size(),
        multiple=multiple,
        packing=settings.packing,
        pinned=resolve_device(trainer) == "cuda",
    )


def evaluation_batching(batch_size: int, trainer: config.Trainer) -> Batching:
    """How batches of the validation split are made."""
    return Batching(
        batch_size,
        rank=ranks.rank(),
        world=ranks.world_size(),
        pinned=resolve_device(trainer) == "cuda",
    )
