"""What structure cannot tell: how layers of one family become those of another.

A student family other than its teacher's is one entry of TRANSLATIONS. Everything else is measured:
see `families.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Translation:
    """How tensors and config of a teacher of one family become those of a student of another."""

    config: Mapping[str, str]  # student's key -> teacher's key, besides SHARED_KEYS
    outer: Mapping[str, str]  # teacher's prefix -> student's prefix, outside the blocks
    block: Mapping[str, str]  # teacher's prefix -> student's prefix, inside a block
    folded: Mapping[str, str]  # embedding -> the embedding to whose rows its row 0 is added
    requires: Mapping[str, Any]  # config values that the student's family fixes


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
