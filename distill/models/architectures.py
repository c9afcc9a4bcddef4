"""What differs between model families, as plain data: where the blocks are, and which family's tensors are a subset of another's.

Paths are relative to the model without its head (`model.base_model`). A new family is one row of ARCHITECTURES; a student
architecture other than its teacher's is one row of TRANSLATIONS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from distill.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The layout of one family, by `model_type` of its config."""

    blocks: str  # the list of transformer blocks
    embeddings: str  # the module whose output enters the first block
    attention: tuple[str, ...]  # query, key and value projections in a block; empty where they are fused
    positions_after_pad: bool = False  # position ids start behind the padding id, not at 0
    requires: Mapping[str, Any] = field(default_factory=dict)  # config values without which a block depends on its place


@dataclass(frozen=True)
class Translation:
    """How a teacher of one family becomes a student of another: names of tensors by prefix, and keys of the config."""

    config: Mapping[str, str]  # student's key -> teacher's key, beside those of SHARED_KEYS
    outer: Mapping[str, str]  # teacher's prefix -> student's, outside the blocks
    block: Mapping[str, str]  # teacher's prefix -> student's, inside a block
    folded: Mapping[str, str]  # teacher's table -> teacher's table to whose rows its row 0 is added
    requires: Mapping[str, Any]  # config values of the teacher that the student's family cannot vary


_BERT = Architecture("encoder.layer", "embeddings", ("attention.self.query", "attention.self.key", "attention.self.value"))
_LLAMA = Architecture("layers", "embed_tokens", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": Architecture(_BERT.blocks, _BERT.embeddings, _BERT.attention, positions_after_pad=True),
    "distilbert": Architecture("transformer.layer", "embeddings", ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
    "gpt2": Architecture("h", "drop", (), requires={"scale_attn_by_inverse_layer_idx": False}),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

# (teacher's model_type, student's model_type); a family is always a subset of itself.
# RoBERTa is no row here: DistilBERT counts positions from 0, RoBERTa from behind its padding id.
TRANSLATIONS: Mapping[tuple[str, str], Translation] = {
    ("bert", "distilbert"): Translation(
        config={
            "dim": "hidden_size",
            "hidden_dim": "intermediate_size",
            "n_heads": "num_attention_heads",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "seq_classif_dropout": "hidden_dropout_prob",
        },
        outer={
            "bert.embeddings.": "distilbert.embeddings.",
            "bert.pooler.dense.": "pre_classifier.",  # tanh there, relu here: a start, not a copy
            "classifier.": "classifier.",
        },
        block={
            "attention.self.query.": "attention.q_lin.",
            "attention.self.key.": "attention.k_lin.",
            "attention.self.value.": "attention.v_lin.",
            "attention.output.dense.": "attention.out_lin.",
            "attention.output.LayerNorm.": "sa_layer_norm.",
            "intermediate.dense.": "ffn.lin1.",
            "output.dense.": "ffn.lin2.",
            "output.LayerNorm.": "output_layer_norm.",
        },
        folded={"bert.embeddings.token_type_embeddings.weight": "bert.embeddings.position_embeddings.weight"},
        requires={"layer_norm_eps": 1e-12, "is_decoder": False},
    )
}
SHARED_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def architecture(model_type: str) -> Architecture:
    """The layout of a family; UserError where it is not known."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"the architecture is {model_type}, but layers can be found only in {', '.join(ARCHITECTURES)}: "
            "take a model of one of these, or do without student.layers and loss.terms"
        )
    return ARCHITECTURES[model_type]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, first to last; block i's output is its layer i."""
    found = model.base_model.get_submodule(architecture(model.config.model_type).blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def embeddings(model: PreTrainedModel) -> nn.Module:
    """The module whose output enters the first block."""
    return model.base_model.get_submodule(architecture(model.config.model_type).embeddings)


def attention_projections(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Query, key and value projections of one of :func:`blocks`; UserError where they are fused into one (GPT-2)."""
    modules = dict(block.named_modules())
    for names in {known.attention for known in ARCHITECTURES.values() if known.attention}:
        if all(name in modules for name in names):
            query, key, value = (modules[name] for name in names)
            assert isinstance(query, nn.Linear)
            assert isinstance(key, nn.Linear)
            assert isinstance(value, nn.Linear)
            return query, key, value
    raise UserError(
        f"the block is a {type(block).__name__}, but attention relations need separate query, key and value layers: "
        "leave this term out, or use hidden states in its place"
    )
