"""What differs between model families, as plain data: where the blocks are, and which family's tensors are a subset of another's.

Paths are relative to the model without its head (`model.base_model`). A new family is one row of ARCHITECTURES; a student
architecture other than its teacher's is one row of TRANSLATIONS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The layout of one family, by `model_type` of its config."""

    blocks: str  # the list of transformer blocks
    embeddings: str  # the module whose output enters the first block
    attention: tuple[
        str, ...
    ]  # query, key and value projections in a block; empty where they are fused
    attention_out: str  # the projection that mixes the heads' outputs
    ffn: tuple[str, ...]  # what fills the neurons of a block's feed-forward network, and reads them
    ffn_out: str
    ffn_width: str  # the config's key of the number of neurons
    heads: tuple[
        str, ...
    ] = ()  # its keys of the numbers of heads, where a head's width need not be hidden size / heads
    positions_after_pad: bool = False  # position ids start behind the padding id, not at 0
    requires: Mapping[str, Any] = field(
        default_factory=dict
    )  # config values without which a block depends on its place


@dataclass(frozen=True)
class Translation:
    """How a teacher of one family becomes a student of another: names of tensors by prefix, and keys of the config."""

    config: Mapping[str, str]  # student's key -> teacher's key, beside those of SHARED_KEYS
    outer: Mapping[str, str]  # teacher's prefix -> student's, outside the blocks
    block: Mapping[str, str]  # teacher's prefix -> student's, inside a block
    folded: Mapping[str, str]  # teacher's table -> teacher's table to whose rows its row 0 is added
    requires: Mapping[
        str, Any
    ]  # config values of the teacher that the student's family cannot vary


_BERT = Architecture(
    blocks="encoder.layer",
    embeddings="embeddings",
    attention=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    ffn=("intermediate.dense",),
    ffn_out="output.dense",
    ffn_width="intermediate_size",
)
_LLAMA = Architecture(
    blocks="layers",
    embeddings="embed_tokens",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    ffn=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    ffn_width="intermediate_size",
    heads=("num_attention_heads", "num_key_value_heads"),
)
_DISTILBERT = Architecture(
    blocks="transformer.layer",
    embeddings="embeddings",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_out="attention.out_lin",
    ffn=("ffn.lin1",),
    ffn_out="ffn.lin2",
    ffn_width="hidden_dim",
)
_GPT2 = Architecture(
    blocks="h",
    embeddings="drop",
    attention=(),
    attention_out="attn.c_proj",
    ffn=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    ffn_width="n_inner",
    requires={"scale_attn_by_inverse_layer_idx": False},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": replace(_BERT, positions_after_pad=True),
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
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
        folded={
            "bert.embeddings.token_type_embeddings.weight": "bert.embeddings.position_embeddings.weight"
        },
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


def embedding_module(model: PreTrainedModel) -> nn.Module:
    """The module whose output enters the first block."""
    return model.base_model.get_submodule(architecture(model.config.model_type).embeddings)


def ffn_width(config: PreTrainedConfig) -> int:
    """Neurons of a block's feed-forward network, as the config says."""
    return (
        getattr(config, architecture(config.model_type).ffn_width) or 4 * config.hidden_size
    )  # null is GPT-2's way to say 4


def head_width(config: PreTrainedConfig) -> int:
    """Features of one attention head, as the config says."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def attention_projections(block: nn.Module) -> tuple[nn.Module, ...]:
    """Query, key and value projections of one of :func:`blocks`; UserError where they are fused into one (GPT-2)."""
    modules = dict(block.named_modules())
    for names in {known.attention for known in ARCHITECTURES.values() if known.attention}:
        if all(name in modules for name in names):
            return tuple(modules[name] for name in names)
    raise UserError(
        f"the block is a {type(block).__name__}, but attention relations need separate query, key and value layers: "
        "leave this term out, or use hidden states in its place"
    )
