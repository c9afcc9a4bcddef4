"""Tables of the differences between model families: paths of blocks, and names of tensors.

Paths are relative to the model without its head (`model.base_model`). A new family is one entry of
ARCHITECTURES; a student family other than its teacher's is one entry of TRANSLATIONS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The layout of a model family, which is the `model_type` of its config."""

    blocks: str  # the list of transformer blocks
    embeddings: str  # the module whose output is the input of the first block
    attention: tuple[str, ...]  # query, key, value projections in a block; () where fused
    attention_out: str  # output projection of the attention
    ffn: tuple[str, ...]  # projections into the feed-forward network's hidden layer
    ffn_out: str  # projection out of it
    ffn_width: str  # config key of the width of the hidden layer
    heads: tuple[str, ...] = ()  # config keys of the numbers of heads, where head_dim is free
    positions_after_pad: bool = False  # position ids start at the padding id + 1, not at 0
    # Config values that blocks need to be independent of their position in the stack.
    requires: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Translation:
    """How tensors and config of a teacher of one family become those of a student of another."""

    config: Mapping[str, str]  # student's key -> teacher's key, besides SHARED_KEYS
    outer: Mapping[str, str]  # teacher's prefix -> student's prefix, outside the blocks
    block: Mapping[str, str]  # teacher's prefix -> student's prefix, inside a block
    folded: Mapping[str, str]  # embedding -> the embedding to whose rows its row 0 is added
    requires: Mapping[str, Any]  # config values that the student's family fixes


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

_TABLES = "bert.embeddings"
# (teacher's model_type, student's model_type); a family needs no translation into itself.
# RoBERTa has no entry: its positions start after the padding id, those of DistilBERT at 0.
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
            "bert.pooler.dense.": "pre_classifier.",  # tanh in BERT, relu here: initialization only
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
        folded={f"{_TABLES}.token_type_embeddings.weight": f"{_TABLES}.position_embeddings.weight"},
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
    """The layout of a family; UserError if it is unknown."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"the architecture is {model_type}, but the layout is known only of "
            f"{', '.join(ARCHITECTURES)}: "
            "take a model of one of these, or leave out student.layers and loss.terms"
        )
    return ARCHITECTURES[model_type]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model, first to last."""
    modules = model.base_model.get_submodule(architecture(model.config.model_type).blocks)
    assert isinstance(modules, nn.ModuleList)
    return modules


def embedding_module(model: PreTrainedModel) -> nn.Module:
    """The module whose output is the input of the first block."""
    return model.base_model.get_submodule(architecture(model.config.model_type).embeddings)


def ffn_width(config: PreTrainedConfig) -> int:
    """The width of the hidden layer of a block's feed-forward network."""
    width = getattr(config, architecture(config.model_type).ffn_width)
    return width or 4 * config.hidden_size  # GPT-2 has None for 4 * hidden_size


def head_width(config: PreTrainedConfig) -> int:
    """The width of one attention head."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def attention_projections(block: nn.Module) -> tuple[nn.Module, ...]:
    """The query, key and value projections of one of :func:`blocks`.

    Raises:
        UserError: They are fused into one layer (GPT-2).
    """
    modules = dict(block.named_modules())
    for names in {family.attention for family in ARCHITECTURES.values() if family.attention}:
        if all(name in modules for name in names):
            return tuple(modules[name] for name in names)
    raise UserError(
        f"the block is a {type(block).__name__}, but attention relations need separate query, key "
        "and value layers: leave this term out, or use hidden states in its place"
    )
