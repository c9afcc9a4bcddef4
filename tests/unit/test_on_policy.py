"""Batches whose completions the student writes: what is drawn, trained on and refused."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from distill import data, models, teacher, teacher_outputs
from distill.data.completions import prompt_of, room, with_completion
from distill.errors import UserError
from distill.module import Distillation
from distill.prepare import prepare_run
from distill.recipe.config import Loss, Optimizer
from distill.teacher_outputs import output_cache
from distill.training import on_policy
from distill.training.loggers import Tracker
from tests.families import LANGUAGE_MODELS
from tests.worlds import LANGUAGE, LLAMA, TINY, few, tiny, trainer, world

SOME = ("gpt2", "bloom", "gemma3_text")


def random_model(family, seed=0):
    """A language model whose next tokens depend on what it reads."""
    torch.manual_seed(seed)
    made = models.load(
        None, {"model_type": family, "vocab_size": 60, **LANGUAGE_MODELS[family]}, CAUSAL, "student"
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


CAUSAL = world(**LANGUAGE).task


@torch.no_grad()
def by_hand(model, prompt, tokens, seed, temperature):
    """The same completion from forwards of the whole text, with no padding and no cache."""
    uniform = np.random.default_rng([*seed]).random(tokens)
    ids = [*prompt]
    for number in range(tokens):
        logits_V = models.logits(model, {"input_ids": torch.tensor([ids])})[0, -1].double()
        if temperature == 0:
            ids.append(int(logits_V.argmax()))
            continue
        probs_V = torch.softmax(logits_V / temperature, 0).numpy()
        below, token = probs_V[0], 0
        while below <= uniform[number]:
            token += 1
            below += probs_V[token]
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0, 1.0, 2.5])
@pytest.mark.parametrize("family", SOME)
def test_a_padded_and_cached_batch_writes_what_each_prompt_alone_would(family, temperature):
    model = random_model(family)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 60, length).tolist() for length in (1, 4, 6, 7, 13)]
    seeds = [(7, number) for number in range(5)]
    state = torch.get_rng_state()
    written = models.write_completions(model, prompts, models.Sampling(8, (), temperature), seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert written == [
        by_hand(model, prompt, 8, seed, temperature)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def test_completions_end_at_a_stop_token_and_hold_only_tokens_that_exist():
    model = random_model("llama")
    prompts, seeds = [[5, 6], [7, 8, 9]], [(0, 0), (0, 1)]
    free = models.write_completions(model, prompts, models.Sampling(12, (), 1.0), seeds)
    stop = free[0][4]
    stopped = models.write_completions(model, prompts, models.Sampling(12, (stop,), 1.0), seeds)
    for ids, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert ids == whole[:end]
    few_classes = models.Sampling(12, (), 1.0, classes=4)
    written = models.write_completions(model, prompts, few_classes, seeds)
    assert {each for ids in written for each in ids} <= set(range(4))


def test_what_was_generated_before_and_settings_of_the_model_change_nothing():
    model = random_model("gpt2")
    sampling = models.Sampling(6, (), 1.0)
    first = models.write_completions(model, [[5, 6, 7]], sampling, [(1,)])
    models.write_completions(model, [[5] * 20], sampling, [(2,)])
    model.generation_config = GenerationConfig(repetition_penalty=9.0, eos_token_id=first[0][0])
    model.train()
    assert models.write_completions(model, [[5, 6, 7]], sampling, [(1,)]) == first
    assert model.generation_config.repetition_penalty == 9.0
    assert model.training


@pytest.mark.parametrize(
    ("labels", "longest", "expected"),
    [
        ([-100, -100, 12, 13], 9, [10, 11]),
        ([-100, 11, -100, 13, 14], 9, [10, 11, 12]),  # the last of two replies
        ([-100, 11, -100, 13, -100], 9, [10, 11, 12]),  # a line break after its end
        ([-100, 11, -100, 13, 14], 2, [11, 12]),  # without its beginning
        ([-100, 11, 12, 13], 9, [10, 11]),  # a plain text
        ([10, 11], 9, [10]),
        ([-100, 11], 9, [10]),
    ],
)
def test_the_prompt_of_an_example_ends_where_its_last_completion_begins(labels, longest, expected):
    example = {"input_ids": np.arange(10, 10 + len(labels)), "labels": np.array(labels), "size": 4}
    assert prompt_of(example, longest) == expected
    other = with_completion(example, expected, [1, 2])
    assert other["input_ids"] == [*expected, 1, 2]
    assert other["labels"] == [-100] * len(expected) + [1, 2]
    assert (other["rows"], other["length"], other["size"]) == (2, len(expected) + 2, 4)


@pytest.mark.parametrize("tokens", [1, 5, 12, 500])
def test_prompt_and_completion_fit_and_half_is_left_for_the_prompt(tokens):
    prompt, completion = room(24, tokens)
    assert prompt + completion == 24
    assert completion == min(tokens, 12)


def test_a_compiled_student_writes_without_graphs_of_its_own():
    model, sampling = random_model("gpt2"), models.Sampling(5, (), 1.0)
    expected = models.write_completions(model, [[5, 6, 7]], sampling, [(1,)])
    compiled = []
    for block in models.blocks(model):
        block.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    assert models.write_completions(model, [[5, 6, 7]], sampling, [(1,)]) == expected
    assert compiled == []


# ---- batches


def writing_loader(made, module, share, accumulate=1, size=8):
    """The training examples of a world, with completions of the student in a share of the steps."""
    batching = data.Batching(size, accumulate, seed=4)
    loader = data.make_loader(made.examples["train"], made.task, made.pad_id, batching)
    loss = Loss(on_policy=share, completion_tokens=5)
    on_policy.install(module, loss, loader, made.tokenizer, seed=9)
    return loader


def replaced(made, share, accumulate=1):
    """Its batches of two epochs."""
    loader, batches = writing_loader(made, distillation(made), share, accumulate), []
    for epoch in range(2):
        loader.plan.set_epoch(epoch)
        batches += list(loader)
    return batches


def distillation(made, **loss):
    module = Distillation(
        made.task, made.model("student", 1, **SMALL), made.model(), Loss(**loss), Optimizer()
    )
    module.trainer = trainer(1)
    return module


SMALL = {"n_layer": 1}


@pytest.fixture(scope="module")
def language(_module_store):
    made = world(**LANGUAGE)
    made.examples["train"] = made.examples["train"].select(range(20))
    return made


def same(left, right):
    return all(
        torch.equal(left.inputs[name], right.inputs[name]) for name in left.inputs
    ) and torch.equal(left.labels, right.labels) and (left.rows, left.tokens) == (
        right.rows, right.tokens
    )  # fmt: skip


def test_a_share_of_the_steps_is_replaced_and_the_others_are_those_of_the_data(language):
    plain = replaced(language, 0.0)
    assert len(plain) == 6  # the last of each epoch with fewer examples
    for share, expected in ((0.5, 3), (1 / 3, 2), (1.0, 6)):
        batches = replaced(language, share)
        pairs = list(zip(batches, plain, strict=True))
        assert sum(not same(*pair) for pair in pairs) == expected
        for batch, other in pairs:
            if not same(batch, other):
                assert (batch.labels == -100).all()
                assert batch.rows == len(batch.labels) <= 5 * len(batch.size)
                assert batch.tokens == batch.inputs["attention_mask"].sum()
                assert batch.inputs["input_ids"].shape[1] <= language.task.max_length


def test_a_run_without_on_policy_steps_has_no_hook(language):
    loader = language.loader()
    on_policy.install(distillation(language), Loss(), loader, language.tokenizer, 0)
    assert loader.rewrite is None


def test_micro_batches_of_a_step_share_its_normalizers(language):
    whole, parts = replaced(language, 1.0), iter(replaced(language, 1.0, accumulate=3))
    for batch in whole:
        micros = [next(parts) for _ in range(3)]
        assert {(each.rows, each.tokens) for each in micros} == {(batch.rows, batch.tokens)}
        assert sum(len(each.labels) for each in micros) == batch.rows
    assert next(parts, None) is None


def test_a_loader_that_resumes_gives_the_same_batches(language):
    def loader():
        return writing_loader(language, distillation(language), 0.5, accumulate=2, size=4)

    first = loader()
    first.plan.set_epoch(1)
    expected = list(first)
    assert len(expected) == 10
    for done in (2, 6):
        resumed = loader()
        resumed.load_state_dict(first.state_dict() | {"position": done})
        assert all(same(*pair) for pair in zip(resumed, expected[done:], strict=True))


@lru_cache
def worlds(family):
    return few(**{"gpt2": LANGUAGE, "llama": LLAMA}[family])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_loss_is_the_divergence_over_the_student_s_tokens(family, divergence):
    made = worlds(family)
    settings = Loss(alpha=0.25, temperature=1.5, divergence=divergence, beta=0.3)
    student = made.model("student", 1)
    module = Distillation(made.task, student, made.model(), settings, Optimizer())
    module.trainer = trainer(1)
    batch = next(iter(writing_loader(made, module, 1.0, size=4)))
    parts = module.eval().parts(batch)
    logits = [
        models.logits(model.eval(), batch.inputs).flatten(0, 1)[batch.positions].double() / 1.5
        for model in (student, module.teacher)
    ]
    q, p = (each.log_softmax(-1) for each in logits)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    mixed = torch.logaddexp(p + np.log(0.3), q + np.log(0.7))
    expected = (
        {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jensen_shannon": 0.3 * kl(p, mixed) + 0.7 * kl(q, mixed),
        }[divergence].sum()
        / batch.rows
        * 1.5**2
    )
    assert parts["supervised"] == 0
    assert parts["divergence"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert parts["loss"].item() == pytest.approx(0.75 * expected.item(), rel=1e-4)


# ---- completions of the teacher


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_teacher_writes_once_what_it_would_write_after_each_prompt(
    language, temperature, monkeypatch
):
    model, split = language.model(), language.examples["train"]
    settings = Loss(completion_tokens=5, sampling_temperature=temperature)
    writer = teacher_outputs.TeacherCompletions(
        model, language.task, language.tokenizer, settings, 3
    )
    written = writer.of_split(split, output_cache.Forward("cpu", 4))
    assert written.column_names == split.column_names
    end = language.tokenizer.eos_token_id
    for number in range(6):
        before, after = split[number], written[number]
        prompt = prompt_of(before, room(24, 5).prompt)
        expected = by_hand(model, prompt, 5, (3, number), temperature)
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert after["input_ids"] == [*prompt, *expected]
        assert after["labels"] == [-100] * len(prompt) + expected
        assert (after["rows"], after["length"]) == (len(expected), len(after["input_ids"]))
        text = language.tokenizer.decode(expected, skip_special_tokens=True)
        assert after["size"] == len(text.encode())
    monkeypatch.setattr(models, "write_completions", None)  # an earlier run has stored them
    again = writer.of_split(split, output_cache.Forward("cpu", 4))
    assert again[:] == written[:]


@pytest.mark.parametrize("outputs", ["cached", "online"])
def test_a_student_learns_what_its_teacher_has_written(outputs, tmp_path):
    spec = LANGUAGE["teacher"] | {"outputs": outputs, "writes": True}
    run = tiny(**LANGUAGE | {"teacher": spec}, loss={"completion_tokens": 4})
    made = prepare_run(run)
    made.examples["train"] = made.examples["train"].select(range(32))
    model = teacher.obtain(run, made, tmp_path, Tracker(run, tmp_path))
    for alpha in (0.5, 1.0):
        run.loss.alpha = alpha
        ready = teacher.with_outputs(run, made, model)
        train = ready.examples["train"]
        assert max(train["rows"]) <= 4
        assert train["labels"][:] != made.examples["train"]["labels"][:]
        cached = "teacher_logits" in train.column_names
        assert cached == (outputs == "cached" and alpha < 1)
        assert ready.examples["test"] is made.examples["test"]


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": {"on_policy": 1.5}}, r"loss\.on_policy is 1\.5"),
        ({"loss": {"on_policy": 0.5, "completion_tokens": 0}}, r"loss\.completion_tokens is 0"),
        ({"loss": {"sampling_temperature": -1}}, r"loss\.sampling_temperature is -1"),
        ({"loss": {"on_policy": 0.5, "alpha": 1.0}}, r"loss\.on_policy is 0\.5.*alpha is 1"),
        (
            {"loss": {"on_policy": 0.5}, "teacher": {"outputs": "cached"}},
            r"loss\.on_policy is 0\.5.*teacher\.outputs is cached",
        ),
        (
            {"loss": {"on_policy": 0.5}, "trainer": {"strategy": "fsdp"}},
            r"loss\.on_policy is 0\.5.*strategy is fsdp",
        ),
        (
            {"teacher": {"writes": True}, "loss": {"divergence": "uld"}},
            r"teacher\.writes is true.*divergence is uld",
        ),
        (
            {"teacher": {"writes": True}, "trainer": {"strategy": "fsdp"}},
            r"teacher\.writes is true.*strategy is fsdp",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(changes, match):
    changes = {**changes, "teacher": LANGUAGE["teacher"] | changes.get("teacher", {})}
    with pytest.raises(UserError, match=match):
        tiny(**LANGUAGE | changes)


@pytest.mark.parametrize(
    ("spec", "share", "match"),
    [
        ({"outputs": "online"}, 0.5, r"loss\.on_policy is 0\.5.*SingleLabelClassification"),
        ({"writes": True}, 0.0, r"teacher\.writes is true.*SingleLabelClassification"),
    ],
)
def test_a_task_whose_models_do_not_write_is_refused_before_its_data_are_loaded(spec, share, match):
    run = tiny(teacher=TINY["teacher"] | spec, loss={"on_policy": share})
    run.data = replace(run.data, source="nowhere.csv")
    with pytest.raises(UserError, match=match):
        prepare_run(run)
