"""Names and configs -> teacher and student.

| file | what it owns |
|---|---|
| `architectures.py` | what differs between model families, as plain data |
| `loading.py` | a name or a config -> a model, or one sentence that says why not |
| `tokenizers.py` | the same for tokenizers, training one on texts, and which one a recipe uses |
| `student.py` | a teacher's layers -> a student, every tensor accounted for |
| `preflight.py` | do teacher, student and data agree: labels, token ids, lengths; fingerprints |
| `forward.py` | inputs -> logits, or the factors of them; on which device |
"""

from distill.models.architectures import attention_projections, blocks, embeddings
from distill.models.forward import accepted, device_of, dtype_of, ends_in_head, fast_in_bf16, logits, on, projected, rows, states
from distill.models.loading import complete, files, load, save
from distill.models.preflight import (
    adopt_labels,
    check_floats,
    check_labels,
    check_length,
    check_tokens,
    fingerprint,
    positions,
    shared_vocabulary,
    tokens,
    width,
)
from distill.models.student import Account, cut, gathered
from distill.models.tokenizers import load_tokenizer, tokenizer_for, train_tokenizer

__all__ = [
    "Account",
    "accepted",
    "adopt_labels",
    "attention_projections",
    "blocks",
    "check_floats",
    "check_labels",
    "check_length",
    "check_tokens",
    "complete",
    "cut",
    "device_of",
    "dtype_of",
    "embeddings",
    "ends_in_head",
    "fast_in_bf16",
    "files",
    "fingerprint",
    "gathered",
    "load",
    "load_tokenizer",
    "logits",
    "on",
    "positions",
    "projected",
    "rows",
    "save",
    "shared_vocabulary",
    "states",
    "tokenizer_for",
    "tokens",
    "train_tokenizer",
    "width",
]
