"""Cached outputs give the loss of the online teacher, exactly or in expectation."""

import logging
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from distill import models, student, teacher, teacher_outputs
from distill.errors import UserError
from distill.losses import sparse
from distill.module import Distillation
from distill.recipe import config
from distill.tasks.batch import CachedHidden, SparseTargets
from distill.teacher_outputs import output_cache
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


def with_dtype(made, dtype):
    return replace(
        made,
        run=replace(
            made.run, teacher=replace(made.run.teacher, dtype=str(dtype).removeprefix("torch."))
        ),
    )


def cached(made, outputs, teacher_model, tokens=50, **loss):
    run = run_with(made, outputs, tokens, **loss)
    return teacher.with_outputs(run, made, teacher_model).examples["train"]


def module_of(made, student_model, teacher_model, outputs="online", **loss):
    run = run_with(made, outputs)
    answering = student.online_part(run.teacher, run.trainer, teacher_model)
    return Distillation(
        made.task, student_model, answering, replace(made.run.loss, **loss), config.Optimizer(), 1
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
def test_hidden_states_give_the_loss_and_gradient_of_the_online_teacher(
    language, dtype, divergence
):
    made = with_dtype(language, dtype)
    teacher_model, student_model = made.model(), made.model("student", seed=1, n_layer=1)
    split = cached(made, "hidden", teacher_model)
    modules = [
        module_of(made, student_model, teacher_model, way, divergence=divergence)
        for way in ("hidden", "online")
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


def test_hidden_states_are_exactly_those_of_the_batch(language):
    """In batches with the same padding nothing is rounded."""
    teacher_model = language.model().bfloat16()
    split = cached(with_dtype(language, torch.bfloat16), "hidden", teacher_model)
    for batch in batches(language, split, batch_size=language.run.evaluate.batch_size):
        online = models.logit_rows(
            teacher_model,
            batch.inputs,
            lambda places, batch=batch: language.task.select_rows(places, batch),
            None,
            factors=True,
        )
        assert torch.equal(batch.teacher.states_ND, online.hidden_ND)


@pytest.mark.parametrize("outputs", ["hidden", "sampled"])
def test_a_student_trains_on_cached_outputs(language, outputs, tmp_path):
    """Hidden states give the weights of online training, to rounding; samples nearly so."""
    ends = []
    for way in ("online", outputs):
        run, folder = run_with(language, way, 64), tmp_path / way
        tracker = Tracker(run, folder)
        teacher_model = teacher.obtain(run, language, folder, tracker)
        split = teacher.with_outputs(run, language, teacher_model).examples["train"]
        examples = type(language.examples)(language.examples | {"train": split})
        data = replace(language, examples=examples)
        student.train_student(run, data, teacher_model, [], folder, tracker)
        trained = models.load(str(folder / "student"), None, language.task, "student")
        ends.append(torch.nn.utils.parameters_to_vector(trained.parameters()))
    assert (ends[0] - ends[1]).abs().max() < (1e-4 if outputs == "hidden" else 2e-2)


def test_hidden_states_need_a_plain_head(language, monkeypatch):
    monkeypatch.setattr(models, "has_linear_head", lambda model: False)
    with pytest.raises(
        UserError,
        match="teacher.outputs is hidden, but .* GPT2LMHeadModel .*: set teacher.outputs=online",
    ):
        cached(language, "hidden", language.model(seed=9))


# ---- a few tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_tokens_are_drawn_from_the_teacher_s_distribution(language, temperature):
    teacher_model = language.model()
    split = cached(language, "sampled", teacher_model, 30, temperature=temperature)
    for batch in batches(language, split, batch_size=16):
        with torch.no_grad():
            logits_NC = language.task.select_rows(models.logits(teacher_model, batch.inputs), batch)
        p = (logits_NC / temperature).softmax(-1)
        assert isinstance(batch.teacher, SparseTargets)
        found = torch.zeros_like(p).scatter_add(1, batch.teacher.ids_NK, batch.teacher.probs_NK)
        assert ((found - p).abs() < (1 + 1e-3) / 30).all()
        torch.testing.assert_close(
            batch.teacher.entropy_N, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5
        )


def test_the_mean_gradient_of_sampled_tokens_is_the_full_gradient(language):
    few = type(language.examples)(train=language.examples["train"].select(range(16)))
    language = replace(language, examples=few)
    teacher_model, student_model = language.model(), language.model("student", seed=1, n_layer=1)
    full = gradient(
        module_of(language, student_model, teacher_model, alpha=0.0),
        next(iter(batches(language, language.examples["train"]))),
    )[1]
    found = []
    for seed in range(40):
        made = replace(language, run=replace(language.run, seed=seed))
        batch = next(iter(batches(language, cached(made, "sampled", teacher_model, 64, alpha=0.0))))
        found.append(
            gradient(
                module_of(language, student_model, teacher_model, "sampled", alpha=0.0), batch
            )[1]
        )
    errors = [(torch.stack(found[:count]).mean(0) - full).norm() for count in (1, len(found))]
    spread = torch.stack([each - full for each in found]).square().sum(1).mean().sqrt()
    assert errors[1] < 1.5 * spread / len(found) ** 0.5
    assert errors[1] < min(0.4 * errors[0], 0.5 * full.norm())


def test_examples_and_seeds_have_different_draws(language):
    """The chunk and the batch of an example do not matter."""
    same = language.examples["train"].select([0] * 6)
    made = replace(language, examples=type(language.examples)(language.examples | {"train": same}))
    teacher_model = language.model()
    first, other = (
        cached(replace(made, run=replace(made.run, seed=seed)), "sampled", teacher_model)[
            "teacher_counts"
        ][:]
        for seed in (0, 1)
    )
    assert len({tuple(codes) for codes in [*first, *other]}) == 12


@pytest.mark.parametrize("outputs", ["hidden", "sampled", "top_k"])
def test_chunks_and_batches_do_not_change_the_outputs(language, outputs, tmp_path, monkeypatch):
    teacher_model = language.model().double().float()
    full = cached(language, outputs, teacher_model)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(output_cache, "CHUNK_BYTES", 3000)
    parts = cached(language, outputs, teacher_model)
    with pa.ipc.open_stream(next(tmp_path.rglob("outputs.arrow"))) as stream:
        assert len(list(stream)) > 3
    for one, other in zip(batches(language, full), batches(language, parts), strict=True):
        for value, other_value in zip(one.teacher, other.teacher, strict=True):
            close = (
                torch.isclose(value.float(), other_value.float(), rtol=1e-3, atol=1e-4)
                if value.shape == other_value.shape
                else torch.zeros(1)
            )
            assert (
                close.float().mean() > 0.99
            )  # a number that lies on the edge may be rounded to the other side


def test_top_k_stores_the_likeliest_tokens_and_warns(language, caplog):
    teacher_model = language.model()
    split = cached(language, "top_k", teacher_model, 5)
    for batch in batches(language, split):
        with torch.no_grad():
            logits_NC = language.task.select_rows(models.logits(teacher_model, batch.inputs), batch)
        largest = (logits_NC / language.run.loss.temperature).softmax(-1).topk(5)
        assert torch.equal(batch.teacher.ids_NK.sort().values, largest.indices.sort().values)
        torch.testing.assert_close(batch.teacher.probs_NK.sum(-1), torch.ones(len(logits_NC)))
    with caplog.at_level(logging.WARNING):
        teacher_outputs.check_outputs(run_with(language, "top_k").teacher, language.task)
        assert "impossible" in caplog.text and "sampled" in caplog.text


def test_sampled_tokens_take_three_bytes_each_and_four_a_row(language):
    split = cached(language, "sampled", language.model(), 12)
    rows = sum(language.examples["train"]["rows"])
    assert (
        len([code for codes in split["teacher_counts"] for code in codes])
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
def test_changed_settings_are_another_cache_entry(
    language, outputs, changes, same, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    teacher_model, changes = language.model(), dict(changes)
    cached(language, outputs, teacher_model)
    other = replace(language, run=replace(language.run, seed=changes.pop("seed", 0)))
    cached(other, outputs, teacher_model, **changes)
    cached(language, "cached", teacher_model)
    assert len(list((tmp_path / "outputs").iterdir())) == 2 + (not same)


def test_logits_beyond_the_vocabulary_are_left_out(language):
    """The student's logits are then sliced to the vocabulary too."""
    wide = [
        language.model(what, seed=seed, vocab_size=340, n_layer=depth)
        for what, seed, depth in (("teacher", 0, 3), ("student", 1, 1))
    ]
    classes = models.shared_logits(language.tokenizer, *wide)
    assert classes == models.vocabulary_size(language.tokenizer) < 340
    for batch in batches(language, cached(language, "sampled", wide[0])):
        assert batch.teacher.ids_NK.max() < classes
        with torch.no_grad():
            logits_NC = language.task.select_rows(models.logits(wide[0], batch.inputs), batch)[
                :, :classes
            ]
        p = (logits_NC / language.run.loss.temperature).softmax(-1)
        torch.testing.assert_close(
            batch.teacher.entropy_N, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5
        )


# ---- refusals


@pytest.mark.parametrize("outputs", ["hidden", "sampled", "top_k"])
def test_sparse_outputs_of_a_classifier_are_refused(outputs, tmp_path):
    made = world()
    run = run_with(made, outputs)
    with pytest.raises(
        UserError,
        match=f"teacher.outputs is {outputs}, but .* SingleLabelClassification",
    ):
        teacher.obtain(run, made, tmp_path, Tracker(run, tmp_path))


def test_a_vocabulary_too_large_for_sampling_is_refused(language, monkeypatch):
    monkeypatch.setattr(sparse, "TOKENS", 100)
    with pytest.raises(
        UserError,
        match="teacher.outputs is sampled, but .* 100 .*teacher.outputs=hidden",
    ):
        cached(language, "sampled", language.model(seed=8))


def test_cached_logits_add_nothing_to_the_cache_key(language):
    """So that entries of runs before there were other outputs stay valid."""
    run, teacher_model = run_with(language, "cached"), language.model()
    tokens = models.vocabulary_size(language.tokenizer)
    outputs = teacher_outputs.build_outputs(
        run.teacher, teacher_model, language.task, run.loss.temperature, tokens, run.seed
    )
    assert outputs.identity == []
