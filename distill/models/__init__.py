"""Loading teacher and student models and tokenizers, from names and configs.

| file | contents |
|---|---|
| `hub.py` | names -> folders; errors of transformers as one sentence |
| `gguf_files.py` | a GGUF file -> a folder |
| `model_files.py` | what a name leads to, from its config files alone |
| `weight_files.py` | the files of weights in a folder: damaged, a pointer, a pickle with code |
| `random_models.py` | a config -> a random model; keys of it that cannot be used |
| `loading.py` | a name or a config -> a model |
| `stored_tensors.py` | the tensors in a model's file compared with those of its architecture |
| `finite_weights.py` | whether weights are finite numbers |
| `generation_settings.py` | stop tokens and sampling settings, which travel with a model |
| `start_tokens.py` | tokens that start and end texts, for models from a config |
| `saving.py` | a model -> a folder that transformers loads |
| `tokenizers.py` | a name or training texts -> a tokenizer |
| `tiny_models.py` | a config -> a narrow random model, on which its family is examined |
| `block_probe.py` | runs of one block with changes: which layers depend on which |
| `block_structure.py` | a transformer block -> its attention and feed-forward network |
| `families.py` | a model or config -> the structure of its family, its blocks |
| `attention_parts.py` | a block -> its queries, keys and values, fused or not |
| `hidden_states.py` | whether the blocks of a family have hidden states of their own |
| `positions.py` | a config -> the longest input |
| `layer_proof.py` | layers of any family -> a shorter config, with a proof of its outputs |
| `architectures.py` | a table of families whose layers fit into another family |
| `layer_selection.py` | layers of a teacher -> a student |
| `token_bytes.py` | the bytes of each token of a tokenizer |
| `vocabulary.py` | compares the tokens of two tokenizers |
| `logit_width.py` | logits of tokens that do not exist: removed or sliced |
| `preflight.py` | checks that teacher, student and data agree; fingerprints |
| `precision.py` | the float type of exports and measurements |
| `sampling.py` | completions that a language model writes, drawn by numbers of the caller |
| `attention_packing.py` | attention of batches whose examples follow each other without padding |
| `frozen_weights.py` | weights that are not trained, in fewer bits of memory |
| `offload.py` | blocks of a frozen model in the memory of the CPU while they do not run |
| `adapters.py` | LoRA adapters: attached, switched off, merged |
| `forward.py` | a batch -> logits, or hidden states and head; devices |
"""

from distill.models.attention_packing import batch_inputs, check_packing, packed_attention
from distill.models.families import blocks
from distill.models.forward import (
    eval_mode,
    evaluated_rows,
    factored_logits,
    forward_arguments,
    has_linear_head,
    head_inputs,
    logit_rows,
    logits,
    on_device,
    resolve_device,
    resolve_teacher_dtype,
    set_checkpointing,
    supports_bf16,
)
from distill.models.generation_settings import (
    check_end,
    end_of_replies,
    generation_identity,
    inherit_generation,
    stop_at,
    stop_tokens,
)
from distill.models.hub import (
    local_files,
    redirect_library_logs,
    resolve_path,
    silence_transformers,
    translate_errors,
)
from distill.models.layer_selection import TensorReport, group_names, select_layers
from distill.models.loading import load, load_trained, skeleton
from distill.models.logit_width import cut_to_vocabulary, num_logits, shared_logits
from distill.models.model_files import check_files
from distill.models.offload import offloaded, offloaded_teacher
from distill.models.precision import (
    checkpoint_dtype,
    in_dtype,
    measured_dtype,
    resolve_export_dtype,
    with_dtype_of,
)
from distill.models.preflight import (
    better_names,
    check_labels,
    check_length,
    check_not_quantized,
    fingerprint,
    max_positions,
    only_ids,
    set_labels,
)
from distill.models.random_models import (
    best_attention,
    check_config_keys,
    check_runs,
    without_weights,
)
from distill.models.sampling import Sampling, until_stop, write_completions
from distill.models.saving import has_own_code, save, save_tokenizer, write_auto_map
from distill.models.token_bytes import token_bytes
from distill.models.tokenizers import (
    Tokenizers,
    build_tokenizers,
    load_tokenizer,
    pair_tokenizers,
    train_tokenizer,
)
from distill.models.vocabulary import (
    check_start,
    check_unused,
    check_vocabulary,
    vocabulary_size,
)
from distill.models.weight_files import check_weights

__all__ = [
    "Sampling",
    "TensorReport",
    "Tokenizers",
    "batch_inputs",
    "best_attention",
    "better_names",
    "blocks",
    "build_tokenizers",
    "check_config_keys",
    "check_end",
    "check_files",
    "check_labels",
    "check_length",
    "check_not_quantized",
    "check_packing",
    "check_runs",
    "check_start",
    "check_unused",
    "check_vocabulary",
    "check_weights",
    "checkpoint_dtype",
    "cut_to_vocabulary",
    "end_of_replies",
    "eval_mode",
    "evaluated_rows",
    "factored_logits",
    "fingerprint",
    "forward_arguments",
    "generation_identity",
    "group_names",
    "has_linear_head",
    "has_own_code",
    "head_inputs",
    "in_dtype",
    "inherit_generation",
    "load",
    "load_tokenizer",
    "load_trained",
    "local_files",
    "logit_rows",
    "logits",
    "max_positions",
    "measured_dtype",
    "num_logits",
    "offloaded",
    "offloaded_teacher",
    "on_device",
    "only_ids",
    "packed_attention",
    "pair_tokenizers",
    "redirect_library_logs",
    "resolve_device",
    "resolve_export_dtype",
    "resolve_path",
    "resolve_teacher_dtype",
    "save",
    "save_tokenizer",
    "select_layers",
    "set_checkpointing",
    "set_labels",
    "shared_logits",
    "silence_transformers",
    "skeleton",
    "stop_at",
    "stop_tokens",
    "supports_bf16",
    "token_bytes",
    "train_tokenizer",
    "translate_errors",
    "until_stop",
    "vocabulary_size",
    "with_dtype_of",
    "without_weights",
    "write_auto_map",
    "write_completions",
]
