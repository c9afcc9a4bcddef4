"""Training batches whose completions the student writes (Agarwal et al. 2024, on-policy GKD).

A share of the optimizer steps trains on prompts of the data and completions of the student, as it
is at that step. Their tokens have no labels: the loss is the divergence from the teacher alone.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from distill import losses, models
from distill.data import EncodedDataset, Loader, MicroBatch, is_dummy_batch
from distill.data.completions import prompt_of, room, with_completion
from distill.module import Distillation
from distill.processes import ranks
from distill.recipe import config
from distill.tasks.batch import Batch

log = logging.getLogger(__name__)

Pairs = Iterable[tuple[MicroBatch, Batch]]
Prompts = Sequence[Sequence[list[int]]]  # of each micro-batch
Seeds = Sequence[Sequence[tuple[int, ...]]]
# (step, prompts, sampling, seeds) -> completions of each micro-batch; a collective
Writer = Callable[[int, Prompts, models.Sampling, Seeds], list[list[list[int]]]]


@dataclass(frozen=True)
class OnPolicy:
    """Replaces the completions of a share of the optimizer steps by the student's.

    Completions depend on the student's weights, and on numbers drawn from (seed, step, example).

    Args:
        module: its student is trained.
        write: writes completions with the student's weights.
        settings: the recipe's section `loss`.
        stops: ids that end a completion.
        dataset: the encoded training examples.
        accumulate: micro-batches of an optimizer step.
        seed: seed of the run.
    """

    module: Distillation
    write: Writer
    settings: config.Loss
    stops: tuple[int, ...]
    dataset: EncodedDataset
    accumulate: int
    seed: int

    def is_on_policy(self, step: int) -> bool:
        """Whether the student writes in the step of this number, from 0: evenly spread."""
        share = self.settings.on_policy
        return math.floor((step + 1) * share) > math.floor(step * share)

    def __call__(self, step: int, pairs: Pairs) -> Iterator[Batch]:
        """The batches to train on, for those of the data from optimizer step `step` on."""
        remaining = iter(pairs)
        while group := list(islice(remaining, self.accumulate)):
            if self.is_on_policy(step):
                yield from self._written(step, group)
            else:
                yield from (batch for _, batch in group)
            step += 1

    def _written(self, step: int, group: Sequence[tuple[MicroBatch, Batch]]) -> list[Batch]:
        """The micro-batches of a step with the student's completions, and new normalizers."""
        completed = iter(self._complete(step, [m for m, _ in group if not is_dummy_batch(m)]))
        batches = [batch if is_dummy_batch(micro) else next(completed) for micro, batch in group]
        real = [batch for batch in batches if not is_dummy_batch(batch)]
        count = [sum(batch.rows for batch in real), sum(batch.tokens for batch in real)]
        rows, tokens = np.sum(ranks.all_gather(count), 0).tolist()
        return [
            batch if is_dummy_batch(batch) else batch._replace(rows=rows, tokens=tokens)
            for batch in batches
        ]

    def _complete(self, step: int, micros: Sequence[MicroBatch]) -> list[Batch]:
        """Micro-batches with completions of the student instead of those in the data."""
        task = self.module.task
        longest, tokens = room(task.max_length, self.settings.completion_tokens)
        examples = [self.dataset.examples(micro.indices) for micro in micros]
        prompts = [[prompt_of(example, longest) for example in group] for group in examples]
        sampling = models.Sampling(
            tokens, self.stops, self.settings.sampling_temperature, self.module.classes
        )
        seeds = [[(self.seed, step, index) for index in micro.indices] for micro in micros]
        written = self.write(step, prompts, sampling, seeds)
        batches = []
        for parts in zip(examples, prompts, written, strict=True):
            completed = [with_completion(*part) for part in zip(*parts, strict=True)]
            batch = self.dataset.collate(completed)
            batches.append(batch._replace(labels=torch.full_like(batch.labels, losses.IGNORED)))
        return batches


def write_here(module: Distillation) -> Writer:
    """The student's completions by `generate` in this process."""

    def write(
        step: int, prompts: Prompts, sampling: models.Sampling, seeds: Seeds
    ) -> list[list[list[int]]]:
        with module.trainer.precision_plugin.forward_context():
            return [
                models.write_completions(module.student, group, sampling, drawn)
                for group, drawn in zip(prompts, seeds, strict=True)
            ]

    return write


def install(
    module: Distillation,
    settings: config.Loss,
    train: Loader,
    tokenizer: Any,
    seed: int,
    write: Writer | None = None,
) -> None:
    """Let the student write the completions of a share of the batches of a loader.

    Args:
        module: its student is trained.
        settings: the recipe's section `loss`.
        train: the loader.
        tokenizer: the student's.
        seed: seed of the run.
        write: writes completions; None: `generate` in this process.
    """
    if settings.on_policy:
        assert isinstance(train.dataset, EncodedDataset)
        log.info(
            "the student writes the completions of %.3g %% of the steps, of at most %d tokens, "
            "which learn from the teacher alone",
            100 * settings.on_policy,
            room(module.task.max_length, settings.completion_tokens).completion,
        )
        train.rewrite = OnPolicy(
            module,
            write or write_here(module),
            settings,
            tuple(models.stop_tokens(module.student, tokenizer)),
            train.dataset,
            train.plan.batching.accumulate,
            seed,
        )
