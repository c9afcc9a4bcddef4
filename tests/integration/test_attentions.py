"""Every family of models, with every attention and every form of a teacher's outputs.

In float32 all of them are ways to compute one result: the same student. `scripts/check_oldest.sh`
runs these tests with the oldest versions of the libraries.
"""

from dataclasses import replace

import pytest
import torch

from distill import models, student, teacher
from distill.stages import Stages
from distill.training import Tracker
from tests.worlds import LANGUAGE, few

_LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_GROUPED = _LAYERS | {"num_key_value_heads": 2}
ENCODERS = {
    "bert": _LAYERS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": _LAYERS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 24,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
}
DECODERS = {
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
}


def sample(families, first):
    """One family by default, the others with the slow tests."""
    return [
        pytest.param(name, marks=[] if name == first else [pytest.mark.slow]) for name in families
    ]


@pytest.fixture(scope="module")
def texts(_module_store):
    return few()


@pytest.fixture(scope="module")
def language(_module_store):
    return few(**LANGUAGE)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Calls of torch's fused attention."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(1)
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


def logits_after_training(made, attention, outputs, folder):
    """The logits of a student that was trained for three steps, on validation examples."""
    run = replace(
        made.run,
        teacher=replace(made.run.teacher, outputs=outputs),
        student=replace(made.run.student, layers=[1]),
        trainer=replace(made.run.trainer, max_steps=3, validations=1),
    )
    model = made.model().eval()
    model.set_attn_implementation(attention)
    prepared = teacher.with_outputs(run, made.prepared, model)
    with Stages()("student"):
        student.train_student(run, prepared, model, [], folder, Tracker(run, folder))
    return logits_of(made, models.load(str(folder / "student"), None, made.task))


@torch.no_grad()
def logits_of(made, model):
    return models.logits(model, next(iter(made.loader("validation"))).inputs)


def check(made, model_type, config, kinds, folder, fused):
    """Compare the students of all attentions and outputs."""
    spec = replace(made.run.teacher, config={"model_type": model_type, **config})
    made = replace(made, run=replace(made.run, teacher=spec))
    results = {}
    for attention in ("eager", "sdpa"):
        for outputs in kinds:
            fused.clear()
            way = f"{attention}, {outputs}"
            results[way] = logits_after_training(made, attention, outputs, folder / way)
            # The models that are loaded for the comparison use it once a layer.
            assert (len(fused) > 1) == (attention == "sdpa")
    untrained = logits_of(made, made.model())
    expected = results["eager, online"]
    assert (expected - untrained).abs().max() > 0.01
    for way, logits in results.items():
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=1e-4, msg=lambda text, way=way: f"{way}: {text}"
        )


@pytest.mark.parametrize("model_type", sample(ENCODERS, "bert"))
def test_encoders_learn_the_same_from_every_teacher(texts, model_type, tmp_path, fused):
    check(texts, model_type, ENCODERS[model_type], ("online", "cached"), tmp_path, fused)


@pytest.mark.parametrize("model_type", sample(DECODERS, "llama"))
def test_decoders_learn_the_same_from_every_teacher(language, model_type, tmp_path, fused):
    kinds = ("online", "cached", "hidden")
    check(language, model_type, DECODERS[model_type], kinds, tmp_path, fused)
