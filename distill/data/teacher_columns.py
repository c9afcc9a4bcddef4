"""Columns of cached teacher outputs -> what a batch carries; `distill/answers.py` writes them.

| `teacher.outputs` | columns, for each example |
|---|---|
| cached | `teacher_logits`: rows of C float32 |
| hidden | `teacher_states`: rows of D numbers, bfloat16 as the integers of the same bits |
| sampled | `teacher_codes`: bytes of :func:`distill.losses.sparse.packed`; `teacher_entropy`: a float32 a row |
| top_k | `teacher_ids`: rows of K tokens; `teacher_shares`: rows of K float32 |
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill.losses import sparse
from distill.tasks.base import CachedHidden, SparseTargets

LOGITS, STATES, CODES, ENTROPY, IDS, SHARES = (
    f"teacher_{name}" for name in ("logits", "states", "codes", "entropy", "ids", "shares")
)
COLUMNS = frozenset((LOGITS, STATES, CODES, ENTROPY, IDS, SHARES))


def read_outputs(table: pa.Table) -> Tensor | CachedHidden | SparseTargets:
    """The rows of some examples, example by example, straight from the file's buffers, for they may be many."""
    columns = dict(zip(table.column_names, table.columns, strict=True))
    if LOGITS in columns:
        return _matrix(columns[LOGITS])
    if STATES in columns:
        states_ND = _matrix(columns[STATES])
        return CachedHidden(
            states_ND.view(torch.bfloat16) if states_ND.dtype == torch.int16 else states_ND
        )
    if CODES in columns:
        entropy_N = _flat(_rows(columns[ENTROPY]))
        return SparseTargets(
            *sparse.unpack_counts(_flat(_rows(columns[CODES])), len(entropy_N)),
            torch.from_numpy(entropy_N),
        )
    shares_NK = _matrix(columns[SHARES])
    return SparseTargets(
        _matrix(columns[IDS]).long(), shares_NK, torch.special.entr(shares_NK).sum(-1)
    )


def _rows(column: pa.ChunkedArray) -> list[pa.Array]:
    return [chunk.flatten() for chunk in column.chunks]


def _flat(chunks: list[pa.Array]) -> np.ndarray:
    return np.concatenate([chunk.to_numpy() for chunk in chunks])


def _matrix(column: pa.ChunkedArray) -> Tensor:
    rows = _rows(column)
    return torch.from_numpy(
        _flat([chunk.flatten() for chunk in rows]).reshape(sum(map(len, rows)), -1)
    )
