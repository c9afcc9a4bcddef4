"""A packed batch has the loss and the gradients of its examples one by one."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from distill import data, models
from distill.data import teacher_columns
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe.config import Loss
from distill.tasks import CausalLanguageModelling
from distill.tasks.collation import model_inputs, pack_inputs
from tests.families import GROUPED, LANGUAGE_MODELS
from tests.grids import sampled

VOCABULARY, CLOSE = 50, {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = (9, 2, 14, 3, 9)  # longer than the windows below
MORE = {
    "gpt2, other positions": {
        "model_type": "gpt2",
        **LANGUAGE_MODELS["gpt2"],
        "scale_attn_weights": False,
    },
    "sliding windows": {"model_type": "mistral", **GROUPED, "sliding_window": 4},
    "chunks": {
        "model_type": "llama4_text",
        **GROUPED,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 4,
    },
    "an encoder that decodes": {"model_type": "bert", **GROUPED, "is_decoder": True},
}
FAMILIES = {name: {"model_type": name, **spec} for name, spec in LANGUAGE_MODELS.items()} | MORE
REFUSED = {  # slopes in place of positions, a recurrent state, positions that count from padding
    "bloom": FAMILIES["bloom"],
    "mpt": {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    "roberta": {"model_type": "roberta", **GROUPED, "is_decoder": True},
}
TAKEN = [name for name in FAMILIES if name not in REFUSED]


def model_of(spec, attention="eager", seed=0):
    """A random model without dropout whose every tensor counts."""
    spec = spec | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"), 0)
    spec |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0)
    config = AutoConfig.for_model(**spec, vocab_size=VOCABULARY, pad_token_id=0)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def split_of(lengths, context=1):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100] * context + row[context:] for row in ids],
            "size": [1] * len(ids),
            "length": lengths,
            "rows": [max(n - context, 0) for n in lengths],
        }
    )


def batches(split, size, packing):
    batching = data.Batching(size, group_by_length=False, packing=packing)
    return list(data.make_loader(split, CausalLanguageModelling(32), 0, batching))


def summed(module, made):
    """The parts of the loss of batches, and the gradient."""
    module.student.zero_grad()
    rows, tokens = (sum(getattr(each, name) for each in made) for name in ("rows", "tokens"))
    parts = [module.parts(each._replace(rows=rows, tokens=tokens)) for each in made]
    sum(each["loss"] for each in parts).backward()
    total = {name: sum(each[name].detach() for each in parts) for name in parts[0]}
    gradient = {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return total | gradient


def check_equal(student, teacher, split, loss=None):
    """Packed in two batches, in one, and with other micro-batches as in batches of one example."""
    module = Distillation(CausalLanguageModelling(32), student, teacher, loss or Loss(alpha=0.5))
    separate = summed(module, batches(split, 1, packing=False))
    for size in (2, len(split)):
        with models.packed_attention(*module.models()):
            packed = summed(module, batches(split, size, packing=True))
        assert packed.keys() == separate.keys()
        for name, value in separate.items():
            torch.testing.assert_close(
                packed[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sampled(TAKEN, always=["gpt2", "gemma2", "sliding windows"]))
def test_packed_loss_and_gradient_are_those_of_separate_examples(family, attention):
    try:
        student, teacher = (model_of(FAMILIES[family], attention, seed) for seed in (0, 1))
    except ValueError:
        assert attention == "sdpa"  # transformers has only eager attention for it
        return
    check_equal(student, teacher, split_of(LENGTHS))


def test_without_an_attention_of_ours_transformers_keeps_examples_apart(monkeypatch):
    monkeypatch.setattr(
        models.attention_packing, "_fitting_attention", lambda _, attention: attention
    )
    monkeypatch.setattr(models.attention_packing, "_PROVEN", {})
    for attention in ("eager", "sdpa"):
        spec = FAMILIES["sliding windows"]
        check_equal(model_of(spec, attention), model_of(spec, attention, 1), split_of(LENGTHS))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_mixes_packed_examples_is_refused(family):
    with pytest.raises(UserError, match=f"data.packing is true.*{REFUSED[family]['model_type']}"):
        models.check_packing(model_of(REFUSED[family]).config)


def test_the_refused_families_do_mix_examples():
    """What the refusal is for: positions or states go over from one example to the next."""
    split = split_of(LENGTHS)
    for family, spec in REFUSED.items():
        student = model_of(spec)
        module = Distillation(CausalLanguageModelling(32), student, None, Loss(alpha=1.0))
        separate = summed(module, batches(split, 1, packing=False))["loss"]
        packed = summed(module, batches(split, len(split), packing=True))["loss"]
        assert (packed - separate).abs() > 1e-3, family


def test_attention_is_as_before_after_training_and_after_an_error():
    student = model_of(FAMILIES["llama"], "sdpa")
    before = student.config.to_json_string(use_diff=False)
    with models.packed_attention(student):
        assert student.config._attn_implementation == models.attention_packing.PACKED
        assert student.config.to_json_string(use_diff=False) == before  # what checkpoints hold
    with models.packed_attention(student, student):  # a student that is its own teacher
        pass
    assert student.config._attn_implementation == "sdpa"
    with pytest.raises(UserError), models.packed_attention(student, model_of(REFUSED["bloom"])):
        pass
    assert student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_recomputed_activations_the_gradient_is_the_same(attention):
    student = model_of(FAMILIES["sliding windows"], attention)
    models.set_checkpointing(student, True)
    check_equal(student, model_of(FAMILIES["llama"], seed=1), split_of(LENGTHS))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_examples_without_context_or_of_one_token(alpha):
    student, teacher = model_of(FAMILIES["llama"]), model_of(FAMILIES["gpt2"], seed=1)
    check_equal(student, teacher, split_of((1, 5, 1, 2), context=0), Loss(alpha=alpha))
    check_equal(student, teacher, split_of((7,)), Loss(alpha=alpha))
    check_equal(student, teacher, split_of((6, 6, 6)), Loss(alpha=alpha))


TERMS = {
    "states": {"_target_": "distill.terms.HiddenStates", "weight": 2.0, "layers": {-1: -1, 1: 2}},
    "relations": {
        "_target_": "distill.terms.AttentionRelations",
        "weight": 3.0,
        "student_layer": 1,
        "teacher_layer": 2,
        "heads": 2,
    },
}


def test_terms_compare_the_tokens_of_each_example():
    student, teacher = model_of(FAMILIES["llama"]), model_of(FAMILIES["qwen2"], seed=1)
    check_equal(student, teacher, split_of(LENGTHS), Loss(alpha=0.3, terms=TERMS))


@torch.no_grad()
def cached(kind, teacher, split):
    """Columns of a teacher's outputs, from one example at a time."""
    columns = {}
    for example in split:
        inputs = {"input_ids": torch.tensor([example["input_ids"]])}
        states_LD = teacher.model(**inputs).last_hidden_state[0, :-1]
        probs_LV = (states_LD @ teacher.lm_head.weight.T).softmax(-1)
        top = probs_LV.topk(4)
        stored = {
            "cached": {teacher_columns.LOGITS: probs_LV.log()},
            "hidden": {teacher_columns.STATES: states_LD},
            "top_k": {
                teacher_columns.IDS: top.indices.int(),
                teacher_columns.PROBS: top.values / top.values.sum(-1, keepdim=True),
            },
        }
        for name, values in stored[kind].items():
            columns.setdefault(name, []).append(values.numpy())
    return columns


@pytest.mark.parametrize("kind", ["cached", "hidden", "top_k"])
def test_stored_outputs_of_the_teacher_meet_their_tokens(kind):
    student, teacher = model_of(FAMILIES["llama"]), model_of(FAMILIES["llama"], seed=1).eval()
    split = split_of(LENGTHS)
    for name, values in cached(kind, teacher, split).items():
        split = split.add_column(name, [value.tolist() for value in values])
    check_equal(
        student, teacher.lm_head if kind == "hidden" else None, split, Loss(temperature=1.0)
    )


def test_packing_keeps_every_token_and_its_place():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 9, (int(torch.randint(1, 6, (), generator=generator)),)).tolist()
        examples = [{"input_ids": torch.randint(1, 50, (n,)).tolist()} for n in lengths]
        padded = model_inputs(examples, pad_id=0)
        packed, layout = pack_inputs(padded)
        ids = [token for example in examples for token in example["input_ids"]]
        assert packed["input_ids"][0].tolist() == ids
        assert packed["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
        assert torch.equal(layout.pad(packed["input_ids"][0]), padded["input_ids"])
        assert torch.equal(layout.unpad(padded["input_ids"]), packed["input_ids"][0])
        assert torch.equal(layout.pad(packed["attention_mask"][0]), padded["attention_mask"])


def test_the_tokens_that_a_model_computes_are_those_of_the_examples():
    split, student = split_of(LENGTHS), model_of(FAMILIES["llama"])
    module = Distillation(CausalLanguageModelling(32), student, None, Loss(alpha=1.0))
    seen = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda _, i: seen.append(i[0].shape[:2]))
    with models.packed_attention(student):
        summed(module, batches(split, len(split), packing=True))
    summed(module, batches(split, len(split), packing=False))
    assert seen == [(1, sum(LENGTHS)), (len(LENGTHS), max(LENGTHS))]
