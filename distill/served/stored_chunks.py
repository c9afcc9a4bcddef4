"""The log-probabilities of a chunk of examples as an entry of the store, and all of them as one.

N = predicted tokens, K = stored tokens of each.
"""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from distill import store
from distill.data import teacher_columns
from distill.served.token_log_probs import TokenLogProbs
from distill.teacher_outputs.output_cache import OUTPUTS_FILE
from distill.teacher_outputs.outputs import Arrays, matrix

log = logging.getLogger("distill")

STATISTICS_FILE = "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """What the log says about a served teacher's outputs; sums over chunks."""

    rows: int = 0
    mass: float = 0.0  # probability of the stored tokens, summed over rows
    least_mass: float = 1.0
    loss: float = 0.0  # nats, summed over the rows whose own token the server listed
    labels: int = 0  # these rows
    repeated: int = 0  # examples that were sent twice
    distance: float = 0.0  # their largest difference at a position, total variation

    def __add__(self, other: "Statistics") -> "Statistics":
        sums = {key: getattr(self, key) + value for key, value in asdict(other).items()}
        extremes = {
            "least_mass": min(self.least_mass, other.least_mass),
            "distance": max(self.distance, other.distance),
        }
        return Statistics(**(sums | extremes))


def write_chunk(folder: Path, results: Sequence[TokenLogProbs], made: Statistics) -> None:
    """Store the results of examples, with their statistics."""
    batch = pa.record_batch(to_columns(results))
    with store.write_entry(folder) as inside:
        with pa.ipc.new_stream(str(inside / OUTPUTS_FILE), batch.schema) as stream:
            stream.write_batch(batch)
        _write_statistics(inside, made)


def to_columns(results: Sequence[TokenLogProbs]) -> Arrays:
    """The stored columns, with a list of rows for each example."""
    ends = np.cumsum([len(result.labels_N) for result in results])
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    probs_NK = np.exp(np.concatenate([result.log_probs_NK for result in results]))
    ids_NK = np.concatenate([result.ids_NK for result in results])
    tails_N = np.concatenate([result.tails for result in results])
    arrays = {
        teacher_columns.IDS: matrix(ids_NK),
        teacher_columns.PROBS: matrix(probs_NK),
        teacher_columns.TAIL: pa.array(tails_N),
    }
    return {name: pa.ListArray.from_arrays(offsets, array) for name, array in arrays.items()}


def statistics(results: Sequence[TokenLogProbs], repeated: int, distance: float) -> Statistics:
    """The statistics of a chunk, of which some examples were sent twice."""
    mass_N = 1 - np.concatenate([result.tails for result in results]).astype(np.float64)
    labels_N = np.concatenate([result.labels_N for result in results]).astype(np.float64)
    return Statistics(
        rows=len(mass_N),
        mass=float(mass_N.sum()),
        least_mass=float(mass_N.min()),
        loss=float(-np.nansum(labels_N)),
        labels=int((~np.isnan(labels_N)).sum()),
        repeated=repeated,
        distance=distance,
    )


def read_first(folder: Path) -> TokenLogProbs:
    """The stored result of a chunk's first example, without the log-probabilities of its tokens."""
    stored = Dataset.from_file(str(folder / OUTPUTS_FILE)).with_format("numpy")[0]
    ids_NK, probs_NK = stored[teacher_columns.IDS], stored[teacher_columns.PROBS]
    return TokenLogProbs(ids_NK, np.log(probs_NK), np.full(len(ids_NK), np.nan, np.float32))


def join(folders: list[Path], entry: Path) -> None:
    """Write all chunks into one entry, and remove theirs."""
    total = sum(map(_read_statistics, folders), Statistics())
    with store.write_entry(entry) as inside:
        _concatenate([folder / OUTPUTS_FILE for folder in folders], inside / OUTPUTS_FILE)
        _write_statistics(inside, total)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _concatenate(files: list[Path], joined: Path) -> None:
    with pa.ipc.open_stream(pa.memory_map(str(files[0]))) as first:
        schema = first.schema
    with pa.ipc.new_stream(str(joined), schema) as writer:
        for file in files:
            with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as stream:
                for batch in stream:
                    writer.write_batch(batch)


def _write_statistics(folder: Path, made: Statistics) -> None:
    (folder / STATISTICS_FILE).write_text(json.dumps(asdict(made)))


def _read_statistics(folder: Path) -> Statistics:
    return Statistics(**json.loads((folder / STATISTICS_FILE).read_text()))


def report(entry: Path, k: int) -> None:
    """Log how much of the probability is stored, and how well the teacher predicts the texts."""
    made = _read_statistics(entry)
    log.info(
        "the served teacher's %d likeliest tokens have %.4f of the probability on average, at "
        "least %.4f; the others are one class of the loss",
        *(k, made.mass / max(made.rows, 1), made.least_mass),
    )
    if made.labels:
        perplexity = math.exp(min(made.loss / made.labels, 700))
        log.info("its perplexity is %.4g on %d tokens", perplexity, made.labels)
    log.info(
        "%d examples that were sent twice differ by at most %.4f in total variation",
        *(made.repeated, made.distance),
    )
