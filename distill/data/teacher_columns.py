"""Columns for the teacher, beside the examples: cached outputs, or inputs of its own.

Outputs, see :mod:`distill.teacher_outputs`, become tensors of a batch:

| `teacher.outputs` | columns, for each example |
|---|---|
| cached | `teacher_logits`: rows of C float32 |
| hidden | `teacher_states`: rows of D floats, bfloat16 as int16 of the same bits |
| sampled | `teacher_counts`: bytes of :func:`distill.losses.sparse.pack_counts`; |
| | `teacher_entropy`: a float32 per row |
| top_k | `teacher_ids`: rows of K tokens; `teacher_probs`: rows of K float32 |
| served | the same, and `teacher_tail`: a float32 per row, the probability of all other tokens |

A teacher that is online and has another tokenizer reads the columns of `Task.encode` that start
with `INPUTS`.

N = rows, C = classes or vocabulary, D = width, K = stored tokens of a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from distill.losses import sparse
from distill.tasks.batch import CachedHidden, FewTokens, SparseTargets, TailTargets

LOGITS, STATES, COUNTS, ENTROPY, IDS, PROBS, TAIL = (
    f"teacher_{name}" for name in ("logits", "states", "counts", "entropy", "ids", "probs", "tail")
)
COLUMNS = frozenset((LOGITS, STATES, COUNTS, ENTROPY, IDS, PROBS, TAIL))
INPUTS = "teacher_inputs."


def rename_inputs(encoded: Dataset) -> Dataset:
    """Examples as the teacher's tokenizer encodes them, under names of their own."""
    return encoded.rename_columns({name: INPUTS + name for name in encoded.column_names})


def split_inputs(
    columns: Mapping[str, list[Any]],
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The columns that the student reads, and those that the teacher reads, if it has its own."""
    inputs = {
        name.removeprefix(INPUTS): values
        for name, values in columns.items()
        if name.startswith(INPUTS)
    }
    return {name: columns[name] for name in columns if not name.startswith(INPUTS)}, inputs


def read_outputs(table: pa.Table) -> Tensor | CachedHidden | FewTokens:
    """The teacher's outputs for the examples of a table, without a copy where possible."""
    columns = dict(zip(table.column_names, table.columns, strict=True))
    if LOGITS in columns:
        return _matrix(columns[LOGITS])
    if STATES in columns:
        states_ND = _matrix(columns[STATES])
        return CachedHidden(
            states_ND.view(torch.bfloat16) if states_ND.dtype == torch.int16 else states_ND
        )
    if COUNTS in columns:
        entropy_N = _concatenate(_rows(columns[ENTROPY]))
        ids_NK, probs_NK = sparse.unpack_counts(
            _concatenate(_rows(columns[COUNTS])), len(entropy_N)
        )
        return SparseTargets(ids_NK, probs_NK, torch.from_numpy(entropy_N))
    probs_NK = _matrix(columns[PROBS])
    ids_NK, entropy_N = _matrix(columns[IDS]).long(), torch.special.entr(probs_NK).sum(-1)
    if TAIL not in columns:
        return SparseTargets(ids_NK, probs_NK, entropy_N)
    tail_N = torch.from_numpy(_concatenate(_rows(columns[TAIL])))
    return TailTargets(ids_NK, probs_NK, entropy_N + torch.special.entr(tail_N), tail_N)


def _rows(column: pa.ChunkedArray) -> list[pa.Array]:
    """The concatenated lists of all examples, by chunk."""
    return [chunk.flatten() for chunk in column.chunks]


def _concatenate(chunks: list[pa.Array]) -> np.ndarray:
    return np.concatenate([chunk.to_numpy() for chunk in chunks])


def _matrix(column: pa.ChunkedArray) -> Tensor:
    """Rows of equal length, (N, length)."""
    rows = _rows(column)
    values = _concatenate([chunk.flatten() for chunk in rows])
    return torch.from_numpy(values.reshape(sum(map(len, rows)), -1))
