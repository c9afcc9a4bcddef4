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

from distill.models.architectures import attention_projections, blocks, embedding_module
from distill.models.forward import (
    factored_logits,
    forward_arguments,
    has_linear_head,
    head_inputs,
    logit_rows,
    logits,
    on_device,
    resolve_device,
    resolve_teacher_dtype,
    supports_bf16,
)
from distill.models.layer_selection import TensorReport, group_names, select_layers
from distill.models.loading import load, load_trained, local_files, save
from distill.models.preflight import (
    check_floats,
    check_labels,
    check_length,
    check_tokens,
    fingerprint,
    max_positions,
    num_logits,
    set_labels,
    shared_logits,
    vocabulary_size,
)
from distill.models.tokenizers import build_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "TensorReport",
    "forward_arguments",
    "set_labels",
    "attention_projections",
    "blocks",
    "check_floats",
    "check_labels",
    "check_length",
    "check_tokens",
    "load_trained",
    "select_layers",
    "resolve_device",
    "resolve_teacher_dtype",
    "embedding_module",
    "has_linear_head",
    "supports_bf16",
    "local_files",
    "fingerprint",
    "group_names",
    "load",
    "load_tokenizer",
    "logits",
    "on_device",
    "max_positions",
    "factored_logits",
    "logit_rows",
    "save",
    "shared_logits",
    "head_inputs",
    "build_tokenizer",
    "vocabulary_size",
    "train_tokenizer",
    "num_logits",
]
