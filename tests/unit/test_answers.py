"""A teacher's outputs in a file: they give what the teacher would, or do so on average."""

import logging
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from distill import models, store, student, teacher
from distill.errors import UserError
from distill.losses import sparse
from distill.module import Distillation
from distill.recipe import config
from distill.tasks.base import CachedHidden, SparseTargets
from distill.training.loggers import Tracker
from tests.worlds import LANGUAGE, world

EXISTING = 300  # tokens of the tokenizer


@pytest.fixture(scope="module")
def language(_module_store):
    made = world(**LANGUAGE)
    made.examples["train"] = made.examples["train"].select(range(40))
    return made


def run_with(made, outputs, tokens=50, **loss):
    return replace(
        made.run,
        teacher=replace(made.run.teacher, outputs=outputs, tokens=tokens),
        loss=replace(made.run.loss, **loss),
    )


def answering_in(made, dtype):
    return replace(
        made,
        run=replace(
            made.run, teacher=replace(made.run.teacher, dtype=str(dtype).removeprefix("torch."))
        ),
    )


def cached(made, outputs, tutor, tokens=50, **loss):
    return teacher.with_outputs(
        run_with(made, outputs, tokens, **loss),
        tutor,
        made.examples["train"],
        made.task,
        made.tokenizer,
    )


def module_of(made, learner, tutor, outputs="online", **loss):
    answering = student._answering(run_with(made, outputs), tutor)
    return Distillation(
        made.task, learner, answering, replace(made.run.loss, **loss), config.Optimizer(), 1
    )


def gradient(module, batch):
    module.eval().zero_grad()
    parts = module.parts(batch)
    parts["loss"].backward()
    return parts, torch.cat([parameter.grad.flatten() for parameter in module.student.parameters()])


def batches(made, split, **options):
    made.examples["any"] = split
    return made.loader("any", **options)


# ---- hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", [None, "reverse_kl"])
def test_hidden_states_teach_as_the_teacher_online(language, dtype, divergence):
    made = answering_in(language, dtype)
    tutor, learner = made.model(), made.model("student", seed=1, n_layer=1)
    split = cached(made, "hidden", tutor)
    modules = [
        module_of(made, learner, tutor, way, divergence=divergence) for way in ("hidden", "online")
    ]
    for batch in batches(made, split, batch_size=16):
        assert isinstance(batch.teacher, CachedHidden)
        assert batch.teacher.states_ND.dtype == dtype
        ends = [gradient(modules[0], batch), gradient(modules[1], batch._replace(teacher=None))]
        near = (
            {"rtol": 1e-4, "atol": 1e-6}
            if dtype == torch.float32
            else {"rtol": 0.05, "atol": 0.02 * ends[0][1].abs().max().item()}
        )
        torch.testing.assert_close(ends[0], ends[1], **near)


def test_hidden_states_are_those_of_the_batch_to_the_last_bit(language):
    """In batches that pad alike, nothing is rounded on the way."""
    tutor = language.model().bfloat16()
    split = cached(answering_in(language, torch.bfloat16), "hidden", tutor)
    for batch in batches(language, split, batch_size=language.run.evaluate.batch_size):
        online = models.logit_rows(
            tutor,
            batch.inputs,
            lambda places, batch=batch: language.task.rows(places, batch),
            None,
            factors=True,
        )
        assert torch.equal(batch.teacher.states_ND, online.hidden_ND)


@pytest.mark.parametrize("outputs", ["hidden", "sampled"])
def test_a_student_trains_on_what_is_cached(language, outputs, tmp_path):
    """From hidden states it ends where it would have online, within the rounding of the teacher's batches; from samples nearby."""
    ends = []
    for way in ("online", outputs):
        run, folder = run_with(language, way, 64), tmp_path / way
        tracker = Tracker(run, folder)
        tutor = teacher.obtain(
            run, language.task, language.tokenizer, language.examples, folder, tracker
        )
        split = teacher.with_outputs(
            run, tutor, language.examples["train"], language.task, language.tokenizer
        )
        examples = type(language.examples)(language.examples | {"train": split})
        student.distil(run, language.task, language.tokenizer, examples, tutor, [], folder, tracker)
        trained = models.load(str(folder / "student"), None, language.task, "student")
        ends.append(torch.nn.utils.parameters_to_vector(trained.parameters()))
    assert (ends[0] - ends[1]).abs().max() < (1e-4 if outputs == "hidden" else 2e-2)


def test_hidden_states_need_a_plain_head(language, monkeypatch):
    monkeypatch.setattr(models, "has_linear_head", lambda model: False)
    with pytest.raises(
        UserError,
        match="teacher.outputs is hidden, but the logits of GPT2LMHeadModel .*: set teacher.outputs=online",
    ):
        cached(language, "hidden", language.model(seed=9))


# ---- a few tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_tokens_are_drawn_from_the_teacher_s_distribution(language, temperature):
    tutor = language.model()
    split = cached(language, "sampled", tutor, 30, temperature=temperature)
    for batch in batches(language, split, batch_size=16):
        with torch.no_grad():
            logits_NC = language.task.rows(models.logits(tutor, batch.inputs), batch)
        p = (logits_NC / temperature).softmax(-1)
        assert isinstance(batch.teacher, SparseTargets)
        found = torch.zeros_like(p).scatter_add(1, batch.teacher.ids_NK, batch.teacher.shares_NK)
        assert ((found - p).abs() < (1 + 1e-3) / 30).all()
        torch.testing.assert_close(
            batch.teacher.entropy_N, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5
        )


def test_on_average_sampled_tokens_give_the_whole_gradient(language):
    tutor, learner = language.model(), language.model("student", seed=1, n_layer=1)
    whole = gradient(
        module_of(language, learner, tutor, alpha=0.0),
        next(iter(batches(language, language.examples["train"]))),
    )[1]
    found = []
    for seed in range(40):
        made = replace(language, run=replace(language.run, seed=seed))
        batch = next(iter(batches(language, cached(made, "sampled", tutor, 64, alpha=0.0))))
        found.append(gradient(module_of(language, learner, tutor, "sampled", alpha=0.0), batch)[1])
    errors = [(torch.stack(found[:count]).mean(0) - whole).norm() for count in (1, len(found))]
    spread = torch.stack([each - whole for each in found]).square().sum(1).mean().sqrt()
    assert errors[1] < 1.5 * spread / len(found) ** 0.5
    assert errors[1] < min(0.4 * errors[0], 0.5 * whole.norm())


def test_no_two_examples_or_seeds_have_the_same_luck(language):
    """Nor does it matter in which chunk or batch an example is."""
    same = language.examples["train"].select([0] * 6)
    made = replace(language, examples=type(language.examples)(language.examples | {"train": same}))
    tutor = language.model()
    first, other = (
        cached(replace(made, run=replace(made.run, seed=seed)), "sampled", tutor)["teacher_codes"][
            :
        ]
        for seed in (0, 1)
    )
    assert len({tuple(codes) for codes in [*first, *other]}) == 12


@pytest.mark.parametrize("outputs", ["hidden", "sampled", "top_k"])
def test_small_chunks_and_batches_hold_the_same(language, outputs, tmp_path, monkeypatch):
    tutor = language.model().double().float()
    whole = cached(language, outputs, tutor)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(teacher, "CHUNK", 3000)
    parts = cached(language, outputs, tutor)
    with pa.ipc.open_stream(next(tmp_path.rglob("outputs.arrow"))) as stream:
        assert len(list(stream)) > 3
    for one, other in zip(batches(language, whole), batches(language, parts), strict=True):
        for mine, theirs in zip(one.teacher, other.teacher, strict=True):
            close = (
                torch.isclose(mine.float(), theirs.float(), rtol=1e-3, atol=1e-4)
                if mine.shape == theirs.shape
                else torch.zeros(1)
            )
            assert (
                close.float().mean() > 0.99
            )  # a number that lies on the edge may be rounded to the other side


def test_top_k_keeps_the_likeliest_and_warns(language, caplog):
    tutor = language.model()
    split = cached(language, "top_k", tutor, 5)
    for batch in batches(language, split):
        with torch.no_grad():
            logits_NC = language.task.rows(models.logits(tutor, batch.inputs), batch)
        kept = (logits_NC / language.run.loss.temperature).softmax(-1).topk(5)
        assert torch.equal(batch.teacher.ids_NK.sort().values, kept.indices.sort().values)
        torch.testing.assert_close(batch.teacher.shares_NK.sum(-1), torch.ones(len(logits_NC)))
    with caplog.at_level(logging.WARNING):
        teacher.answers.check(run_with(language, "top_k"), language.task)
        assert "impossible" in caplog.text and "sampled" in caplog.text


def test_sampled_tokens_take_three_bytes_each_and_four_a_row(language):
    split = cached(language, "sampled", language.model(), 12)
    rows = sum(language.examples["train"]["rows"])
    assert (
        len([code for codes in split["teacher_codes"] for code in codes])
        <= 12 * sparse.BYTES * rows
    )
    assert len([value for values in split["teacher_entropy"] for value in values]) == rows


@pytest.mark.parametrize(
    ("outputs", "changes", "same"),
    [
        ("hidden", {"temperature": 3.0}, True),
        ("hidden", {"tokens": 9}, True),
        ("sampled", {"temperature": 3.0}, False),
        ("sampled", {"tokens": 9}, False),
        ("sampled", {"seed": 1}, False),
        ("top_k", {"temperature": 3.0}, False),
        ("top_k", {"tokens": 9}, False),
        ("top_k", {"seed": 1}, True),
    ],
    ids=str,
)
def test_another_ingredient_is_another_cache(
    language, outputs, changes, same, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    tutor, changes = language.model(), dict(changes)
    cached(language, outputs, tutor)
    other = replace(language, run=replace(language.run, seed=changes.pop("seed", 0)))
    cached(other, outputs, tutor, **changes)
    cached(language, "cached", tutor)
    assert len(list((tmp_path / "outputs").iterdir())) == 2 + (not same)


def test_a_cache_of_few_tokens_knows_those_that_exist(language):
    """Logits beyond the tokenizer's ids have no part in the loss then."""
    wide = [
        language.model(what, seed=seed, vocab_size=340, n_layer=depth)
        for what, seed, depth in (("teacher", 0, 3), ("student", 1, 1))
    ]
    assert models.shared_logits(language.tokenizer, *wide) is None
    classes = models.shared_logits(language.tokenizer, *wide, existing=True)
    assert classes == models.vocabulary_size(language.tokenizer) < 340
    for batch in batches(language, cached(language, "sampled", wide[0])):
        assert batch.teacher.ids_NK.max() < classes
        with torch.no_grad():
            logits_NC = language.task.rows(models.logits(wide[0], batch.inputs), batch)[:, :classes]
        p = (logits_NC / language.run.loss.temperature).softmax(-1)
        torch.testing.assert_close(
            batch.teacher.entropy_N, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5
        )


# ---- refusals


@pytest.mark.parametrize("outputs", ["hidden", "sampled", "top_k"])
def test_classifiers_logits_are_few_and_kept_whole(outputs, tmp_path):
    made = world()
    run = run_with(made, outputs)
    with pytest.raises(
        UserError,
        match=f"teacher.outputs is {outputs}, but SingleLabelClassification .*: set teacher.outputs=cached",
    ):
        teacher.obtain(
            run, made.task, made.tokenizer, made.examples, tmp_path, Tracker(run, tmp_path)
        )


def test_a_vocabulary_too_large_to_be_stored_is_refused(language, monkeypatch):
    monkeypatch.setattr(sparse, "TOKENS", 100)
    with pytest.raises(
        UserError,
        match="teacher.outputs is sampled, but the vocabulary has .* tokens and 100 .*set teacher.outputs=hidden",
    ):
        cached(language, "sampled", language.model(seed=8))


def test_an_outdated_entry_is_not_taken_for_another_kind(language):
    """Logits, which were there first, have the key that they had."""
    run, tutor = run_with(language, "cached"), language.model()
    kept = teacher.answers.wanted(
        run, tutor, language.task, models.vocabulary_size(language.tokenizer)
    )
    assert kept.identity == []
    assert store.entry_path(
        "outputs", {"a": 1} | ({"outputs": kept.identity} if kept.identity else {})
    ) == store.entry_path("outputs", {"a": 1})
