"""Training examples whose completions the teacher writes, once (Kim & Rush 2016).

They are stored, and are then examples like any others: their tokens are labels.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from distill import data, models, store
from distill.data.completions import prompt_of, room, with_completion
from distill.processes import ranks
from distill.recipe import config
from distill.stages import show_progress
from distill.tasks.base import Task
from distill.teacher_outputs.output_cache import Forward, write_shares

log = logging.getLogger(__name__)

VERSION = 1  # of stored completions: raise it when they change
FILE = "examples.arrow"
CHUNK = 512  # examples whose prompts are sorted by length together


@dataclass(frozen=True)
class TeacherCompletions:
    """Writes completions of encoded examples.

    Args:
        teacher: a language model.
        task: encoded the examples.
        tokenizer: the tokenizer of both models.
        settings: the recipe's section `loss`: length and temperature.
        seed: seed of the run.
    """

    teacher: PreTrainedModel
    task: Task
    tokenizer: Any
    settings: config.Loss
    seed: int

    def of_split(self, split: Dataset, forward: Forward) -> Dataset:
        """A split with the teacher's completions, written now or by an earlier run."""
        sampling = models.Sampling(
            self.settings.completion_tokens,
            tuple(models.stop_tokens(self.teacher, self.tokenizer)),
            self.settings.sampling_temperature,
            models.vocabulary_size(self.tokenizer),
            forward.batch_size,
        )
        ingredients = {
            "weights": models.fingerprint(self.teacher),
            "inputs": data.fingerprint(split),
            "made by": [VERSION, *self.task.identity()],
            "sampling": asdict(sampling),
            "seed": self.seed,
            "device": forward.device,
        }
        entry = store.entry_path("completions", ingredients)
        if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
            log.info(
                "the teacher's completions of an earlier run with the same ingredients are used"
            )
        else:
            log.info("the teacher writes completions of %d examples", len(split))
            with models.on_device(forward.device, self.teacher):
                write_shares(
                    entry, FILE, lambda file: self._write_share(split, sampling, forward, file)
                )
        written = Dataset.from_file(str(entry / FILE))
        _log_ends(written, sampling.stops)
        return written

    def _write_share(
        self, split: Dataset, sampling: models.Sampling, forward: Forward, file: Path
    ) -> None:
        """Write this rank's chunks."""
        starts = range(0, len(split), CHUNK)[ranks.rank() :: ranks.world_size()]
        rows, schema = split.with_format(None), split.features.arrow_schema
        hidden = not show_progress(forward.progress)
        bar = Progress(console=Console(), transient=True, disable=hidden)
        with bar, pa.ipc.new_stream(str(file), schema) as stream:
            for start in bar.track(starts, description="teacher completions"):
                chunk = data.columns_to_examples(rows[start : start + CHUNK])
                examples = self._complete(chunk, start, sampling)
                stream.write_batch(pa.RecordBatch.from_pylist(examples, schema=schema))

    def _complete(
        self, examples: list[dict[str, Any]], first: int, sampling: models.Sampling
    ) -> list[dict[str, Any]]:
        """Examples from index `first` of the split on, with the teacher's completions."""
        longest, tokens = room(self.task.max_length, sampling.tokens)
        prompts = [prompt_of(example, longest) for example in examples]
        seeds = [(self.seed, first + number) for number in range(len(examples))]
        written = models.write_completions(
            self.teacher, prompts, replace(sampling, tokens=tokens), seeds
        )
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            with_completion(example, prompt, ids) | {"size": len(text.encode())}
            for example, prompt, ids, text in zip(examples, prompts, written, texts, strict=True)
        ]


def _log_ends(written: Dataset, stops: tuple[int, ...]) -> None:
    ends = [labels[-1] in stops for labels in written["labels"]]
    log.info(
        "the teacher's completions have %.1f tokens on average, and %.0f %% of them stop",
        np.mean(written.with_format("numpy")["rows"][:]),
        100 * np.mean(ends),
    )
