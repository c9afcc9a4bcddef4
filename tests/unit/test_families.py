"""Every family: structure by function, positions, and each technique with its export."""

import pytest
import torch
from transformers import AutoConfig

from distill.compress.proofs import TECHNIQUES, check_structure
from distill.errors import UserError
from distill.models.families import examine_family
from distill.models.positions import counts_from_padding, positions
from distill.models.tiny_models import tiny_model
from tests.families import FAMILIES, GRID, LANGUAGE_MODELS, SHARED_BIAS, outcome
from tests.grids import sampled
from tests.unit.tiny_runs import run_here


def config(family, **changes):
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return AutoConfig.for_model(family, **(ids | FAMILIES[family] | changes))


REFUSED = {  # what a family cannot have, beside the heads of SHARED_BIAS: words of the sentence
    ("albert", "hidden_states"): "one block",
    ("xlnet", "attention"): "outputs of linear layers",
    ("xlnet", "heads"): "outputs of linear layers",
    ("xlnet", "unequal_heads"): "outputs of linear layers",
    ("phi3", "unequal_heads"): "heads in unequal numbers",
    ("minicpm3", "attention"): "outputs of linear layers",
    ("minicpm3", "heads"): "outputs of linear layers",
    ("minicpm3", "unequal_heads"): "outputs of linear layers",
}
REFUSED |= {(name, kind): "has other outputs" for name in SHARED_BIAS for kind in TECHNIQUES[-2:]}


@pytest.mark.parametrize("family", sampled(FAMILIES, every=99, always=["phi3"], rest="slow"))
def test_techniques_are_proven_or_refused_from_the_config_alone(family):
    before = torch.random.get_rng_state()
    for technique in TECHNIQUES:
        sentence = REFUSED.get((family, technique))
        if sentence is None:
            check_structure(config(family), [technique])
        else:
            with pytest.raises(UserError, match=sentence):
                check_structure(config(family), [technique])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("bert", 40),
        ("roberta", 39),
        ("mpnet", 38),
        ("opt", 40),
        ("llama", 40),
        ("xlnet", None),
        ("t5", None),
        ("deberta-v2", None),
        ("bloom", None),
    ],
)
def test_positions_are_those_that_the_model_runs_with(family, limit):
    assert positions(config(family)).limit == limit
    model = tiny_model(config(family))
    fits = 50 if limit is None else limit
    run = torch.full((1, fits), 5)
    extra = {"decoder_input_ids": run} if family == "t5" else {}
    model(input_ids=run, attention_mask=torch.ones_like(run), **extra)
    if limit is not None and family != "llama":  # rotary positions end by the config alone
        run = torch.full((1, limit + 1), 5)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=run, attention_mask=torch.ones_like(run))


def test_only_positions_behind_the_padding_id_depend_on_it():
    assert counts_from_padding(config("roberta", pad_token_id=1))
    assert positions(config("roberta", pad_token_id=1)).limit == 38
    assert not counts_from_padding(config("opt", pad_token_id=1))
    assert not counts_from_padding(config("bert"))


def test_a_family_is_the_same_at_any_width():
    narrow, wide = (
        examine_family(config("llama", hidden_size=32 * factor, intermediate_size=48 * factor))
        for factor in (1, 8)
    )
    for before, after in zip(narrow.stacks, wide.stacks, strict=True):
        assert after.attention.head_width == 8 * before.attention.head_width
        assert (after.path, after.ffn, after.ffn_key) == (before.path, before.ffn, before.ffn_key)


ROWS = [(family, row) for row in GRID for family in FAMILIES]


SLOW = [("falcon", "unequal heads"), ("gemma3_text", "4 bit"), ("t5", "layers"), ("bloom", "int8")]
SLOW += [("deberta-v2", "attention"), ("modernbert", "hidden states"), ("gpt_neox", "heads")]
GRID_ROWS = sampled([row for row in ROWS if row not in SLOW], every=999, always=[("phi3", "heads")])
GRID_ROWS += [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW]


@pytest.mark.parametrize(("family", "row"), GRID_ROWS)
def test_each_technique_ends_in_an_export_that_agrees_or_in_a_sentence(
    family, row, tmp_path, monkeypatch
):
    monkeypatch.setattr("distill.isolated.run_isolated", run_here)
    result = outcome(family, row, tmp_path)
    technique = {"unequal heads": "unequal_heads", "hidden states": "hidden_states"}.get(row, row)
    expected = REFUSED.get((family, technique))
    if (family, row) == ("albert", "removed layers"):
        expected = "one block"
    if expected is None:
        assert result == "works"
    else:
        assert expected in result


def test_language_models_are_those_that_predict_tokens():
    for family in LANGUAGE_MODELS:
        assert config(family).is_encoder_decoder is False
