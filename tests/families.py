"""Tiny configs of model families, and what happens when a technique is applied to one of them."""

import copy
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from distill import export, models, student
from distill.errors import UserError
from distill.packing import ExportSpec
from distill.recipe.capabilities import RUNTIMES
from distill.training.loggers import Tracker
from tests.techniques import RAMP, technique
from tests.worlds import LANGUAGE, World, callbacks_of, world

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GROUPED = ENCODER | {"num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
DEBERTA = ENCODER | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
# Families of classifiers and of language models: name -> model_type and sizes.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "camembert": ENCODER,
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
    },
    "electra": ENCODER | {"embedding_size": 16},
    "albert": ENCODER | {"embedding_size": 16},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA
    | {"position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "mpnet": ENCODER,
    "modernbert": ENCODER
    | {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "local_attention": 8,
    },
    "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    "t5": T5 | {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"},
    "bart": BART,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
    "gpt_neox": ENCODER,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 40,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "phi3": GROUPED,
    "smollm3": GROUPED,
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "minicpm3": GROUPED
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    },
}
FAMILIES = CLASSIFIERS | LANGUAGE_MODELS
SHARED_BIAS = ("mpnet", "t5", "bloom", "deberta")  # heads that a position bias names by number

CUT = {"layers": [0, 2]}
WHOLE = {"layers": [0, 1, 2]}
# technique -> sections of the recipe: student, terms of the loss, callbacks, export format
GRID: dict[str, dict[str, Any]] = {
    "layers": {"student": CUT},
    "hidden states": {
        "student": CUT,
        "terms": {"hidden": {"_target_": "distill.terms.HiddenStates", "layers": {-1: -1, 1: 2}}},
    },
    "attention": {
        "student": CUT,
        "terms": {
            "relations": {
                "_target_": "distill.terms.AttentionRelations",
                "student_layer": 1,
                "teacher_layer": 2,
                "heads": 2,
            }
        },
    },
    "neurons": {"callbacks": {"x": technique("PruneNeurons", amount=0.5, **RAMP)}},
    "heads": {"callbacks": {"x": technique("PruneHeads", amount=0.5, **RAMP)}},
    "unequal heads": {
        "callbacks": {"x": technique("PruneHeads", amount=0.34, equal=False, **RAMP)}
    },
    "removed layers": {"callbacks": {"x": technique("PruneLayers", layers=[1], start=0.4)}},
    "factors": {"callbacks": {"x": technique("Factorize", rank=4, start=0.3)}},
    "masks": {
        "callbacks": {"x": technique("PruneWeights", sparsity=0.6, **RAMP)},
        "format": "packed",
    },
    "4 bit": {"callbacks": {"x": technique("Quantize", bits=4, start=0.3)}, "format": "packed"},
    "int8": {
        "callbacks": {"x": technique("Quantize", bits=8, activations="dynamic", start=0.3)},
        "format": "packed",
    },
}
EXPORTS = ("dense", "packed", "torchao", *RUNTIMES)


@lru_cache(maxsize=2)
def family_world(family: str) -> World:
    """Data, tokenizer and task of a family, with a recipe of a few steps."""
    changes: dict[str, Any] = LANGUAGE if family in LANGUAGE_MODELS else {}
    teacher = {"config": {"model_type": family, **FAMILIES[family]}, "outputs": "online"}
    merged = {
        **changes,
        "teacher": teacher | {"dtype": "float32"},
        "trainer": {"max_steps": 5, "validations": 1},
        "data": {**changes.get("data", {}), "batch_size": 64},
    }
    made = world(**merged)
    for split, count in (("train", 128), ("validation", 32), ("test", 32)):
        rows = min(count, len(made.examples[split]), len(made.raw[split]))
        made.examples[split] = made.examples[split].select(range(rows))
        made.raw[split] = made.raw[split].select(range(rows))
    return made


def distilled(family: str, row: str, folder: Path, form: str | None = None) -> Path:
    """Train a student of a family with one technique, and export it with a proof."""
    made, settings = family_world(family), copy.deepcopy(GRID[row])
    run = copy.deepcopy(made.run)
    run.callbacks = settings.get("callbacks", {})
    run.loss.terms = {
        name: {"weight": 1.0} | term for name, term in settings.get("terms", {}).items()
    }
    run.student.layers = _layers(family, settings.get("student", WHOLE)["layers"])
    run.export = replace(run.export, format=form or settings.get("format", "dense"), smaller=False)
    torch.manual_seed(0)
    teacher = made.model()
    callbacks = callbacks_of(run, made)
    student.train_student(run, made.prepared, teacher, callbacks, folder, Tracker(run, folder))
    models.save(teacher, made.tokenizer, folder / "teacher")
    tokenizer = models.load_tokenizer(str(folder / "student"))
    spec = ExportSpec(run.export, run.data, made.task, tokenizer, made.raw["train"])
    return export.export(run, spec, made.raw["test"], folder)


def _layers(family: str, layers: list[int]) -> list[int]:
    """The same layers of the decoder, if there is one."""
    both = family in ("t5", "bart")
    return layers + [3 + layer for layer in layers] if both else layers


def outcome(family: str, row: str, folder: Path, form: str | None = None) -> str:
    """`works` if the export of the student agrees with it, or the sentence that refuses it."""
    try:
        exported = distilled(family, row, folder, form)
    except UserError as error:
        return str(error)
    proof = json.loads((exported / "proof.json").read_text())
    return "works" if proof["agreement"] == 1.0 else f"agreement is {proof['agreement']}"
