"""Loading teacher and student models and tokenizers, from names and configs.

| file | contents |
|---|---|
| `hub.py` | names -> folders; errors of transformers as one sentence |
| `loading.py` | a name or a config -> a model |
| `stored_tensors.py` | the tensors in a model's file compared with those of its architecture |
| `saving.py` | a model -> a folder that transformers loads |
| `tokenizers.py` | a name or training texts -> a tokenizer |
| `architectures.py` | tables of the differences between model families |
| `layer_selection.py` | layers of a teacher -> a student |
| `preflight.py` | checks that teacher, student and data agree; fingerprints |
| `forward.py` | a batch -> logits, or hidden states and head; devices |
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
from distill.models.hub import local_files, resolve_path, silence_transformers, translate_errors
from distill.models.layer_selection import TensorReport, group_names, select_layers
from distill.models.loading import best_attention, load, load_trained
from distill.models.preflight import (
    check_labels,
    check_length,
    check_not_quantized,
    check_vocabulary,
    fingerprint,
    max_positions,
    num_logits,
    set_labels,
    shared_logits,
    vocabulary_size,
)
from distill.models.saving import has_own_code, save, write_auto_map
from distill.models.tokenizers import build_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "TensorReport",
    "attention_projections",
    "best_attention",
    "blocks",
    "build_tokenizer",
    "check_labels",
    "check_length",
    "check_not_quantized",
    "check_vocabulary",
    "embedding_module",
    "factored_logits",
    "fingerprint",
    "forward_arguments",
    "group_names",
    "has_linear_head",
    "has_own_code",
    "head_inputs",
    "load",
    "load_tokenizer",
    "load_trained",
    "local_files",
    "logit_rows",
    "logits",
    "max_positions",
    "num_logits",
    "on_device",
    "resolve_device",
    "resolve_path",
    "resolve_teacher_dtype",
    "save",
    "select_layers",
    "set_labels",
    "shared_logits",
    "silence_transformers",
    "supports_bf16",
    "train_tokenizer",
    "translate_errors",
    "vocabulary_size",
    "write_auto_map",
]
