"""Models whose logits are computed from hidden states: detected, with the same logits."""

import pytest
import torch
from torch import nn

from distill import models
from distill.compress import fake_quant
from distill.losses import chunked
from distill.remote_code.modeling import factorize
from distill.tasks import CausalLanguageModelling
from tests.unit.test_models import CAUSAL, SIZES, random

TASK = CausalLanguageModelling(8)
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}
AFTERWARDS = {  # what follows the head in these families
    "gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 30.0},
    "cohere": SMALL | {"logit_scale": 0.0625},
    "granite": SMALL | {"logits_scaling": 8.0},
}
INPUTS = {
    "input_ids": torch.randint(4, 50, (3, 6)),
    "attention_mask": torch.ones(3, 6, dtype=torch.long),
}


def made(family, **changes):
    sizes = AFTERWARDS.get(family) or SIZES[family]
    return models.load(
        None, {"model_type": family, "vocab_size": 50, "pad_token_id": 0} | sizes | changes, TASK
    )


def flat(places):
    return places.flatten(0, 1)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("classes", [None, 50, 41])
def test_factors_give_the_logits(family, classes):
    model = random(family, TASK)
    assert models.has_linear_head(model)
    expected, factors = (
        models.logit_rows(model, INPUTS, flat, classes, factors=factors)
        for factors in (False, True)
    )
    assert isinstance(factors, chunked.FactoredLogits)
    assert factors.hidden_ND.shape[0] == 18
    torch.testing.assert_close(factors.logits(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        models.logit_rows(model, INPUTS, flat, classes, factors=False), expected
    )  # nothing of it stays


@pytest.mark.parametrize("family", AFTERWARDS)
def test_logits_that_are_changed_after_the_head_are_detected(family):
    assert not models.has_linear_head(made(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0})],
)
def test_disabled_changes_of_the_logits_do_not_matter(family, changes):
    assert models.has_linear_head(made(family, **changes))


def test_a_classifier_has_no_such_head():
    from tests.unit.test_models import classification

    assert not models.has_linear_head(random("bert", classification()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_or_factorized_head_gives_logits(tied):
    model = random("llama", TASK, tie_word_embeddings=tied)
    if tied:
        fake_quant.attach_fake_quant(
            model,
            {"lm_head.weight": {"method": "linear", "bits": 8, "symmetric": True, "group": 0}},
        )
    else:
        factorize(model, "lm_head", 3)
        nn.init.normal_(model.lm_head.first.weight)
        nn.init.normal_(model.lm_head.second.weight)
    assert not models.has_linear_head(model)
    answered = models.logit_rows(model, INPUTS, flat, None, factors=True)
    assert torch.equal(answered, flat(models.logits(model, INPUTS)))


def test_an_error_leaves_the_head_as_it_was():
    model = random("gpt2", TASK)
    with pytest.raises(ZeroDivisionError):
        models.logit_rows(model, INPUTS, lambda places: 1 / 0, None, factors=True)
    assert model(**INPUTS).logits.shape[-1] == 50


def test_the_check_of_a_head_draws_no_random_numbers_and_leaves_no_gradient():
    model = random("gpt2", TASK)
    state = torch.get_rng_state()
    models.has_linear_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
