import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from distill import losses
from distill.errors import UserError
from distill.tasks.batch import Batch
from distill.terms import AttentionRelations, HiddenStates, Term

SIZES = {
    "bert": {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24},
    "distilbert": {"n_layers": 3, "n_heads": 4, "hidden_dim": 24},
    "llama": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    },
    "gpt2": {"n_layer": 3, "n_head": 4},
}


def model(model_type: str = "bert", width: int = 16, seed: int = 0, **options) -> PreTrainedModel:
    torch.manual_seed(seed)
    key = {"distilbert": "dim", "gpt2": "n_embd"}.get(model_type, "hidden_size")
    config = AutoConfig.for_model(
        model_type, vocab_size=50, pad_token_id=0, **{key: width}, **SIZES[model_type], **options
    )
    auto = (
        AutoModelForSequenceClassification
        if model_type in ("bert", "distilbert")
        else AutoModelForCausalLM
    )
    return auto.from_config(config, attn_implementation="eager").eval()


def batch(
    lengths: tuple[int, ...] = (5, 3), padded_to: int = 5, tokens: float | None = None
) -> Batch:
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    ids = (
        torch.randint(1, 50, (len(lengths), 20), generator=torch.Generator().manual_seed(1))[
            :, :padded_to
        ]
        * mask
    )
    counts = torch.zeros(len(lengths), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return Batch(
        inputs,
        counts,
        None,
        counts,
        counts,
        tokens=float(sum(lengths)) if tokens is None else tokens,
    )


def value(term: Term, student: PreTrainedModel, teacher: PreTrainedModel, of: Batch) -> Tensor:
    """One step: both models run, then the term compares."""
    with torch.no_grad():
        teacher(**of.inputs)
    student(**of.inputs)
    return term(of)


def attached(term: Term, student: PreTrainedModel, teacher: PreTrainedModel) -> Term:
    term.attach(student, teacher)
    return term


# one row for each kind of term; its layers exist in all models above
TERMS = {
    "mse": lambda: HiddenStates(1.0, {-1: -1, 0: 1, 2: 2}),
    "cosine": lambda: HiddenStates(1.0, {0: 1}, distance="cosine"),
    "relations": lambda: AttentionRelations(1.0, student_layer=1, teacher_layer=2, heads=2),
}
TERM = pytest.mark.parametrize("make", TERMS.values(), ids=TERMS.keys())


# ---- laws of every term


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize(
    "term",
    [
        HiddenStates(1.0, {-1: -1, 0: 0, 2: 2}),
        HiddenStates(1.0, {1: 1}, "cosine"),
        AttentionRelations(1.0, 1, 1, heads=2),
    ],
    ids=["mse", "cosine", "relations"],
)
def test_identical_models_are_at_zero_exactly(model_type, term):
    student = model(model_type)
    teacher = copy.deepcopy(student)
    assert value(attached(term, student, teacher), student, teacher, batch()) == 0


@TERM
def test_padding_changes_nothing(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    short, long = (value(term, student, teacher, batch(padded_to=width)) for width in (5, 9))
    assert short > 0
    torch.testing.assert_close(long, short)


@TERM
def test_micro_batches_add_up_to_the_whole_batch(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    full = batch((5, 3, 1, 4))
    parts = []
    for rows in ([0], [1, 2], [3]):
        inputs = {key: tensor[rows] for key, tensor in full.inputs.items()}
        parts.append(value(term, student, teacher, full._replace(inputs=inputs)))
    torch.testing.assert_close(torch.stack(parts).sum(), value(term, student, teacher, full))


@TERM
def test_tokens_of_the_global_batch_normalise(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    values = [value(term, student, teacher, batch(tokens=tokens)) for tokens in (8.0, 16.0)]
    torch.testing.assert_close(values[0], 2 * values[1])


@TERM
def test_gradient_reaches_the_student_and_not_the_teacher(make):
    student, teacher = model(), model(seed=1)
    value(attached(make(), student, teacher), student, teacher, batch()).backward()
    assert (
        sum(
            parameter.grad.abs().sum()
            for parameter in student.parameters()
            if parameter.grad is not None
        )
        > 0
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


@TERM
def test_teacher_gets_no_gradient_even_where_it_runs_with_one(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    teacher(**batch().inputs)
    student(**batch().inputs)
    term(batch()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@TERM
def test_values_stay_float32_under_autocast_and_with_a_bfloat16_teacher(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    exact = value(term, student, teacher, batch())
    teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = value(term, student, teacher, batch())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=1e-3)
    rough.backward()


@TERM
def test_only_the_last_forward_counts(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    expected = value(term, student, teacher, batch())
    student(**batch((9, 9, 9), 9).inputs)  # a validation batch in between, say
    assert value(term, student, teacher, batch()).equal(expected)


@TERM
def test_what_was_recorded_is_used_once(make):
    student, teacher = model(), model(seed=1)
    term = attached(make(), student, teacher)
    value(term, student, teacher, batch())
    student(**batch().inputs)
    with pytest.raises(AssertionError, match="both models"):
        term(batch())  # the teacher has not run on this batch


@TERM
def test_detach_leaves_no_hook_and_attaching_again_no_second_one(make):
    student, teacher = model(), model(seed=1)
    term = make()

    def hooks() -> int:
        return sum(
            len(module._forward_hooks) for both in (student, teacher) for module in both.modules()
        )

    before = hooks()
    term.attach(student, teacher)
    count = hooks()
    term.attach(student, teacher)
    assert hooks() == count > before
    term.detach()
    assert hooks() == before
    assert not term._captures


@TERM
def test_attaching_changes_neither_the_outputs_nor_the_state_of_the_models(make):
    student, teacher = model(width=8), model(seed=1)
    keys, logits = student.state_dict().keys(), student(**batch().inputs).logits
    attached(make(), student, teacher)
    assert student.state_dict().keys() == keys
    assert student(**batch().inputs).logits.equal(logits)


@TERM
def test_weight_is_left_to_the_caller(make):
    student, teacher = model(), model(seed=1)
    light, heavy = make(), make()
    heavy.weight = 7.0
    values = [
        value(attached(term, student, teacher), student, teacher, batch())
        for term in (light, heavy)
    ]
    assert values[0].equal(values[1])


# ---- hidden states


def test_hidden_states_are_those_that_the_model_reports():
    student, teacher, of = model(), model(seed=1), batch()
    term = attached(HiddenStates(1.0, {-1: 1, 2: 0}), student, teacher)
    mine, theirs = (
        both(**of.inputs, output_hidden_states=True).hidden_states for both in (student, teacher)
    )
    pairs = [(mine[0], theirs[2]), (mine[3], theirs[1])]  # the model counts the embeddings as 0
    expected = [(a - b)[of.inputs["attention_mask"].bool()].square().mean() for a, b in pairs]
    torch.testing.assert_close(term(of), torch.stack(expected).mean())


def test_projections_exist_only_where_widths_differ_and_learn():
    student, teacher = model(width=8), model(seed=1, width=16)
    assert not list(
        attached(HiddenStates(1.0, {0: 0}), teacher, copy.deepcopy(teacher)).parameters()
    )
    term = attached(HiddenStates(1.0, {0: 1, 2: 2}), student, teacher)
    assert {name: tuple(parameter.shape) for name, parameter in term.named_parameters()} == {
        "projections.0_1.weight": (16, 8),
        "projections.2_2.weight": (16, 8),
    }
    value(term, student, teacher, batch()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in term.parameters()
    )


def test_projections_are_seeded_kept_when_attached_again_and_loaded_from_a_checkpoint():
    student, teacher = model(width=8), model(seed=1)
    terms = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        terms.append(attached(HiddenStates(1.0, {0: 1}), student, teacher))
    first, same, other = (term.state_dict()["projections.0_1.weight"].clone() for term in terms)
    assert first.equal(same)
    assert not first.equal(other)
    terms[0].attach(student, teacher)
    assert terms[0].state_dict()["projections.0_1.weight"].equal(first)
    terms[2].load_state_dict(terms[0].state_dict())
    assert terms[2].state_dict()["projections.0_1.weight"].equal(first)


def test_a_learned_projection_brings_the_distance_down():
    student, teacher = model(width=8), model(seed=1)
    term = attached(HiddenStates(1.0, {2: 2}), student, teacher)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = value(term, student, teacher, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_hidden_states_cross_architectures():
    student, teacher = model("distilbert"), model("bert", seed=1)
    term = attached(HiddenStates(1.0, {-1: -1, 0: 1}), student, teacher)
    assert value(term, student, teacher, batch()) > 0


def test_hidden_states_work_for_gpt2():
    student = model("gpt2")
    teacher = copy.deepcopy(student)
    assert (
        value(
            attached(HiddenStates(1.0, {-1: -1, 2: 2}), student, teacher), student, teacher, batch()
        )
        == 0
    )
    assert (
        value(attached(HiddenStates(1.0, {-1: 0}), student, teacher), student, teacher, batch()) > 0
    )


# ---- attention relations


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
def test_relations_need_nothing_learned_when_widths_differ(model_type):
    student, teacher = (
        model(model_type, width=8),
        model("bert" if model_type == "distilbert" else model_type, seed=1),
    )
    term = attached(AttentionRelations(1.0, 0, 2, heads=2), student, teacher)
    assert value(term, student, teacher, batch()) > 0
    assert not list(term.parameters())


def test_relations_do_not_see_biases_and_rotations_that_leave_them_unchanged():
    """Rotations of queries, keys and values inside a relation head do not change its value."""
    student = model()
    teacher = copy.deepcopy(student)
    attention = teacher.bert.encoder.layer[1].attention.self
    rotation = torch.block_diag(*(torch.linalg.qr(torch.randn(8, 8)).Q for _ in range(2)))
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.weight.copy_(rotation @ linear.weight)
            linear.bias.copy_(rotation @ linear.bias)
    term = attached(AttentionRelations(1.0, 1, 1, heads=2), student, teacher)
    assert value(term, student, teacher, batch()).item() == pytest.approx(0, abs=1e-6)


# ---- bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStates(0, {0: 0}), "weight of HiddenStates is 0"),
        (lambda: HiddenStates("heavy", {0: 0}), "weight of HiddenStates is heavy"),
        (lambda: AttentionRelations(-1, 0, 0, heads=2), "weight of AttentionRelations is -1"),
        (lambda: HiddenStates(1, {}), "layers of HiddenStates is {}"),
        (lambda: HiddenStates(1, {"first": 0}), "layers of HiddenStates is {'first': 0}"),
        (lambda: HiddenStates(1, [0, 1]), r"layers of HiddenStates is \[0, 1\]"),
        (
            lambda: HiddenStates(1, {0: 0}, distance="l1"),
            "distance of HiddenStates is l1.*mse, cosine",
        ),
        (
            lambda: AttentionRelations(1, -1, 0, heads=2),
            "student_layer of AttentionRelations is -1",
        ),
        (
            lambda: AttentionRelations(1, 0, None, heads=2),
            "teacher_layer of AttentionRelations is None",
        ),
        (lambda: AttentionRelations(1, 0, 0, heads=0), "heads of AttentionRelations is 0"),
    ],
)
def test_bad_arguments_are_refused_by_value(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            HiddenStates(1, {3: 0}),
            "student layer of a loss term is 3, but .* 3 layers: .* 0 to 2",
        ),
        (
            HiddenStates(1, {0: 12}),
            "teacher layer of a loss term is 12, but .* 3 layers: .* 0 to 2",
        ),
        (HiddenStates(1, {-2: 0}), "student layer of a loss term is -2"),
        (AttentionRelations(1, 3, 0, heads=2), "student layer of a loss term is 3"),
        (
            AttentionRelations(1, 0, 0, heads=3),
            "heads of AttentionRelations is 3, but it must divide the student's width of 16",
        ),
    ],
)
def test_layers_and_heads_that_do_not_exist_are_refused(term, message):
    with pytest.raises(UserError, match=message):
        term.attach(model(), model(seed=1))


def test_relations_of_fused_projections_are_those_of_separate_ones():
    """The thirds of GPT-2's fused layer, computed here from its input."""
    student, teacher, of = model("gpt2"), model("gpt2", seed=1), batch()
    inputs = []
    for each in (student, teacher):
        each.transformer.h[1].attn.c_attn.register_forward_pre_hook(
            lambda layer, arguments: inputs.append((layer, arguments[0]))
        )
    term = attached(AttentionRelations(1, 1, 1, heads=2), student, teacher)
    actual = value(term, student, teacher, of)
    states = [
        (states @ layer.weight + layer.bias).split(16, -1) for layer, states in reversed(inputs)
    ]
    mask = of.inputs["attention_mask"]
    each = [
        losses.relation_kl(*(part.unflatten(-1, (2, 8)).transpose(1, 2) for part in pair), mask)
        for pair in zip(*states, strict=True)
    ]
    expected = losses.mean_over(torch.stack(each).mean(0), of.tokens)
    torch.testing.assert_close(actual, expected)
