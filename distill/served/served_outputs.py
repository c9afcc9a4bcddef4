"""Examples -> the outputs of a served teacher, in the store.

The examples are divided into chunks, each an entry of the store: a run that is stopped, or whose
server stops, continues with the first missing chunk. Nothing is stored before some examples were
sent again, after others, with the same result.

N = predicted tokens, K = stored tokens of each.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress

from distill import data, models, store
from distill.prepare import Prepared
from distill.processes import ranks
from distill.recipe import config
from distill.served import stored_chunks
from distill.served.client import Client
from distill.served.server_checks import (
    check_likelihood,
    check_repeated,
    check_tokenizer,
    mean_loss,
)
from distill.served.server_kinds import ServerKind, connect
from distill.served.token_log_probs import TokenLogProbs
from distill.stages import show_progress
from distill.tasks.base import Task
from distill.teacher_outputs.output_cache import OUTPUTS_FILE, check_disk_space
from distill.teacher_outputs.selection import check_outputs

log = logging.getLogger("distill")

VERSION = 1  # of stored chunks: raise it when their contents change
CHUNK_EXAMPLES = 128
CONCURRENT = 16  # requests at a time, which a server computes in one batch
REPEATED = 2  # examples of a chunk that are sent twice
PROBES = 8  # examples that are sent before all others
_FIRST_ATTEMPTS = 3  # the first request fails within two seconds where there is no server


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind a server, and the examples of which it gives log-probabilities.

    Args:
        spec: The recipe's section `teacher`.
        task: Selects the predicted tokens.
        tokenizer: The student's, which must be the teacher's.
        client: Reaches the server.
        progress: Whether a progress bar is drawn.
    """

    spec: config.Teacher
    task: Task
    tokenizer: Any
    client: Client
    progress: bool = False

    @property
    def tokens(self) -> int:
        """Size of the vocabulary."""
        return models.vocabulary_size(self.tokenizer)

    @property
    def k(self) -> int:
        """Stored tokens of a position."""
        return min(self.spec.tokens, self.tokens)

    def name(self) -> str:
        """The name of the teacher in the key of its stored outputs."""
        return self.spec.served_model or self.spec.model or self.connect(1).model

    def connect(self, length: int) -> ServerKind:
        """The server, which must be there now and take examples of this length."""
        first = replace(self.client, attempts=_FIRST_ATTEMPTS)
        names = (self.spec.served_model, self.spec.model)
        kind = connect(first, names, self.k, self.tokens, length)
        return type(kind)(self.client, kind.model, kind.k, kind.tokens)

    def example(self, example: dict[str, Any]) -> tuple[list[int], np.ndarray]:
        """The tokens of an encoded example, and the indices of the predicted ones."""
        positions = self.task.collate([example], self.tokenizer.pad_token_id).positions
        assert positions is not None  # of a task that selects positions
        return list(map(int, example["input_ids"])), positions.numpy() + 1


def columns_of_run(spec: config.Teacher, prepared: Prepared, progress: bool) -> Dataset:
    """The columns of a served teacher's outputs for the training split of a run.

    Args:
        spec: The recipe's section `teacher`.
        prepared: The data.
        progress: Whether a progress bar is drawn.
    """
    assert spec.url is not None  # which the recipe's check requires
    check_outputs(spec, prepared.task)
    client = Client(spec.url)
    teacher = ServedTeacher(spec, prepared.task, prepared.tokenizer, client, progress)
    return served_columns(teacher, prepared.examples["train"])


def served_columns(teacher: ServedTeacher, examples: Dataset) -> Dataset:
    """The columns of a served teacher's outputs for encoded examples.

    Raises:
        UserError: The server is down, or what it gives cannot be believed.
    """
    with ranks.rank_zero_first():
        name = teacher.name()
    ingredients = {
        "served": [VERSION, name, teacher.k, teacher.tokens],
        "inputs": data.fingerprint(examples),
        "made by": teacher.task.identity(),
    }
    entry = store.entry_path("outputs", ingredients)
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the served teacher's outputs of an earlier run are used again")
    else:
        check_disk_space(8 * teacher.k + 4, teacher.spec.outputs, examples)
        _request_all(teacher, examples, entry, ingredients)
    stored_chunks.report(entry, teacher.k)
    return Dataset.from_file(str(entry / OUTPUTS_FILE))


def _request_all(
    teacher: ServedTeacher, examples: Dataset, entry: Path, ingredients: dict[str, Any]
) -> None:
    """Request the missing chunks, each rank its own, and join them."""
    chunks = [
        range(start, min(start + CHUNK_EXAMPLES, len(examples)))
        for start in range(0, len(examples), CHUNK_EXAMPLES)
    ]
    folders = [
        store.entry_path("served", ingredients | {"chunk": [chunk.start, chunk.stop]})
        for chunk in chunks
    ]
    with ranks.rank_zero_first():
        kind = teacher.connect(max(examples["length"]))
        if ranks.is_rank_zero():
            _check_server(teacher, kind, examples)
            _check_stored(teacher, kind, examples, dict(zip(folders, chunks, strict=True)))
    bar = Progress(console=Console(), transient=True, disable=not show_progress(teacher.progress))
    with bar:
        bar_id = bar.add_task("served teacher", total=len(examples))
        for chunk, folder in list(zip(chunks, folders, strict=True))[
            ranks.rank() :: ranks.world_size()
        ]:
            if not store.is_intact(folder):
                _write_chunk(teacher, kind, examples.select(chunk), folder)
            bar.advance(bar_id, len(chunk) * ranks.world_size())
    ranks.barrier()
    if ranks.is_rank_zero():
        stored_chunks.join(folders, entry)
    ranks.barrier()


def _check_server(teacher: ServedTeacher, kind: ServerKind, examples: Dataset) -> None:
    """Compare some examples with themselves in another order, and their tokens with ours."""
    count = min(PROBES, len(examples))
    chosen = examples.select([place * len(examples) // count for place in range(count)])
    first = _request(teacher, kind, chosen)
    check_tokenizer(kind.client.url, first, teacher.tokenizer)
    check_likelihood(kind.client.url, mean_loss(first), teacher.tokens)
    again = _request(teacher, kind, reversed(list(chosen)))
    check_repeated(kind.client.url, first, again[::-1])


def _check_stored(
    teacher: ServedTeacher, kind: ServerKind, examples: Dataset, chunks: dict[Path, range]
) -> None:
    """Compare the first stored chunk with the server, which may have got another model since."""
    for folder, chunk in chunks.items():
        if (folder / store.MANIFEST).is_file() and store.is_intact(folder):
            again = _request(teacher, kind, examples.select([chunk.start]))
            check_repeated(kind.client.url, [stored_chunks.read_first(folder)], again)
            return


def _request(
    teacher: ServedTeacher, kind: ServerKind, examples: Iterable[dict[str, Any]]
) -> list[TokenLogProbs]:
    """The log-probabilities of examples, requested concurrently, in their order."""
    # Its threads are daemons: a run that is stopped does not wait for their requests.
    with ThreadPool(CONCURRENT) as pool:
        return list(pool.imap(lambda each: kind.log_probs(*teacher.example(each)), examples))


def _write_chunk(teacher: ServedTeacher, kind: ServerKind, examples: Dataset, folder: Path) -> None:
    """Request the examples of a chunk, some of them twice, and store them."""
    results = _request(teacher, kind, examples)
    repeated = min(REPEATED, len(examples))
    again = _request(teacher, kind, examples.select(range(repeated)))
    distance = check_repeated(kind.client.url, results[:repeated], again)
    stored_chunks.write_chunk(
        folder, results, stored_chunks.statistics(results, repeated, distance)
    )
