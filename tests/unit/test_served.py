"""A served teacher: its outputs are those of the same teacher here, or the run stops and says why.

The server of these tests answers from a random model (tests/log_prob_server.py).
"""

import logging
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import losses, models, served, store, student, teacher
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import config
from distill.served import Client, ServedTeacher, served_outputs, server_checks
from distill.served.client import KEY
from distill.served.token_log_probs import TokenLogProbs
from distill.tasks.batch import TailTargets
from distill.training.loggers import Tracker
from tests.log_prob_server import serve
from tests.worlds import LANGUAGE, tiny, world

TOKENS = 20  # K of these tests
EXAMPLES, CHUNK, PROBES = 11, 4, 3


@pytest.fixture(scope="module")
def language(_module_store):
    made = world(**LANGUAGE)
    made.examples["train"] = made.examples["train"].select(range(EXAMPLES))
    return made


def model_of(made, seed=0):
    """A random model whose distributions are neither flat nor confident."""
    model = made.model(seed=seed)
    ids = torch.tensor([made.examples["train"][0]["input_ids"]])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3 / model(ids).logits.std())
    return model


@pytest.fixture
def server(language):
    with serve(model_of(language), language.tokenizer) as made:
        yield made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(served_outputs, "CHUNK_EXAMPLES", CHUNK)
    monkeypatch.setattr(served_outputs, "PROBES", PROBES)
    monkeypatch.setattr(served_outputs, "CONCURRENT", 4)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))


def spec_of(server, **changes):
    return config.Teacher(outputs="served", url=server.url, tokens=TOKENS, **changes)


def columns(made, server, attempts=4, **changes):
    spec = spec_of(server, **changes)
    client = Client(server.url, attempts=attempts, timeout=20, delay=0.002)
    served_teacher = ServedTeacher(spec, made.task, made.tokenizer, client)
    return served.served_columns(served_teacher, made.examples["train"])


def expected_log_probs(made, model):
    """The model's log-probabilities at each predicted token, example by example, without tasks."""
    rows = []
    for example in made.examples["train"]:
        ids, labels = example["input_ids"], example["labels"]
        logits = model(torch.tensor([ids])).logits[0].detach()
        rows += [logits[i - 1].log_softmax(-1) for i in range(1, len(ids)) if labels[i] != -100]
    return torch.stack(rows)


def joined(dataset):
    table = dataset.with_format("arrow")[:]
    return {name: table[name].combine_chunks().flatten() for name in table.column_names}


# ---- the same outputs as a teacher here


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp", "somebody's"])
def test_served_is_the_local_teacher(language, kind):
    model = model_of(language)
    log_p = expected_log_probs(language, model)
    expected = log_p.topk(TOKENS)
    with serve(model, language.tokenizer, kind) as server:
        made = joined(columns(language, server))
    ids = torch.tensor(made["teacher_ids"].flatten().to_numpy()).view(-1, TOKENS)
    probs = torch.tensor(made["teacher_probs"].flatten().to_numpy()).view(-1, TOKENS)
    assert len(ids) == sum(language.examples["train"]["rows"])
    torch.testing.assert_close(probs, expected.values.exp(), rtol=1e-4, atol=1e-6)
    same_order = ids == expected.indices
    near = expected.values.diff(dim=-1).abs() < 1e-4  # equal up to rounding: any order
    assert (same_order[:, :-1] | near).all()
    tail = torch.tensor(made["teacher_tail"].to_numpy())
    torch.testing.assert_close(tail, 1 - expected.values.exp().sum(-1), rtol=1e-3, atol=1e-5)


def test_a_student_trains_on_a_served_teacher(language, server, tmp_path, caplog):
    run = replace(
        language.run,
        teacher=spec_of(server),
        student=config.Student(model=str(tmp_path / "base")),
        loss=replace(language.run.loss, temperature=1.0, alpha=0.2),
    )
    models.save(language.model("student", seed=1), language.tokenizer, tmp_path / "base")
    tracker = Tracker(run, tmp_path)
    frozen = teacher.obtain(run, language.prepared, tmp_path, tracker)
    assert frozen is None
    with caplog.at_level(logging.INFO):
        prepared = teacher.with_outputs(run, language.prepared, frozen)
    assert "perplexity" in caplog.text
    student.train_student(run, prepared, frozen, [], tmp_path, tracker)
    before, after = (
        models.load(str(tmp_path / name), None, language.task, "student")
        for name in ("base", "student")
    )
    teacher_log_p = expected_log_probs(language, model_of(language))
    distances = [
        losses.forward_kl(expected_log_probs(language, model), teacher_log_p, 1.0).mean()
        for model in (before, after)
    ]
    assert distances[1] < distances[0]


def test_the_loss_of_all_tokens_is_the_loss_of_the_local_teacher(language):
    """With K = all tokens nothing is lost: loss and gradient are those of the teacher online."""
    torch.manual_seed(0)
    student_NC = torch.randn(7, 12, requires_grad=True)
    teacher_NC = torch.randn(7, 12)
    log_p, ids = teacher_NC.log_softmax(-1).topk(12)
    result = TokenLogProbs(ids.int().numpy(), log_p.numpy(), np.zeros(7))
    tail = torch.zeros(7)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    sparse = losses.sparse_kl(student_NC, 1.0, ids, log_p.exp(), entropy, tail)
    full = losses.forward_kl(student_NC, teacher_NC, 1.0)
    torch.testing.assert_close(sparse, full)
    gradients = [torch.autograd.grad(each.sum(), student_NC)[0] for each in (sparse, full)]
    torch.testing.assert_close(*gradients)
    assert result.tails.max() < 1e-6


@given(st.integers(1, 9), st.integers(0, 99))
def test_the_tail_is_one_class(k, seed):
    """At most the full divergence; 0 with gradient 0 for the student that is the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NC = 3 * torch.randn(5, 10, generator=generator, dtype=torch.float64)
    student_NC = 3 * torch.randn(5, 10, generator=generator, dtype=torch.float64)
    p, ids = teacher_NC.softmax(-1).topk(k)
    tail = 1 - p.sum(-1)
    entropy = torch.special.entr(p).sum(-1) + torch.special.entr(tail)

    def divergence(logits):
        return losses.sparse_kl(logits, 1.0, ids, p, entropy, tail)

    q = student_NC.softmax(-1).gather(-1, ids)  # by hand: K + 1 classes
    by_hand = (p * (p / q).log()).sum(-1) + tail * (tail / (1 - q.sum(-1))).log()
    torch.testing.assert_close(divergence(student_NC), by_hand)
    full = losses.forward_kl(student_NC, teacher_NC, 1.0)
    assert (divergence(student_NC) <= full + 1e-9).all()
    same = teacher_NC.clone().requires_grad_()
    value = divergence(same)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-9, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert gradient.abs().max() < 1e-9


def test_batches_hold_the_tail(language, server):
    made = replace(language, examples=dict(language.examples))
    split = language.prepared.with_train_columns(columns(language, server)).examples["train"]
    made.examples["any"] = split
    module = Distillation(
        language.task,
        language.model("student", seed=1),
        None,
        config.Loss(alpha=0.0, temperature=1.0),
        config.Optimizer(),
        1,
    )
    for batch in made.loader("any", batch_size=8):
        assert isinstance(batch.teacher, TailTargets)
        total = batch.teacher.probs_NK.sum(-1) + batch.teacher.tail_N
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
        chunks = Distillation(
            language.task,
            module.student,
            None,
            replace(module.loss, chunk=3),
            config.Optimizer(),
            1,
        )
        chunks.eval()  # without dropout, as the student of both then is
        with torch.no_grad():
            torch.testing.assert_close(
                module.parts(batch)["divergence"], chunks.parts(batch)["divergence"]
            )


# ---- faults that a later request mends


@pytest.mark.parametrize("fault", ["busy", "cut", "garbled"])
def test_a_request_is_repeated(language, server, fault):
    made = joined(columns(language, server))
    for entry in store.cache_root().rglob("outputs.arrow"):
        entry.unlink()
    setattr(server, fault, 3)
    again = joined(columns(language, server))
    assert getattr(server, fault) == 0
    assert all(made[name].equals(again[name]) for name in made)


def test_a_server_that_comes_back_is_sent_the_missing_chunks_only(language, server):
    server.last = 2 * PROBES + 2 * (CHUNK + served_outputs.REPEATED) + 3
    with pytest.raises(UserError, match=r"teacher.url is .*127.0.0.1.*keeps what the server gave"):
        columns(language, server, attempts=2)
    stored = [tuple(ids) for ids in language.examples["train"]["input_ids"][: 2 * CHUNK]]
    server.prompts, server.last, server.down = [], None, False
    resumed = joined(columns(language, server))
    # Of the stored examples, the probes are sent twice, and the first is compared with its chunk.
    # Requests of the lost run that arrive late are of the last chunk.
    probes = [stored[number * EXAMPLES // PROBES] for number in range(PROBES)]
    expected, sent = Counter([*probes, *probes, stored[0]]), Counter(server.prompts)
    assert {ids: sent[ids] for ids in stored} == {ids: expected[ids] for ids in stored}
    for entry in store.cache_root().rglob("outputs.arrow"):
        entry.unlink()
    at_once = joined(columns(language, server))
    assert all(resumed[name].equals(at_once[name]) for name in at_once)


def test_a_stored_chunk_of_another_model_under_the_same_name(language, server):
    server.last = 2 * PROBES + CHUNK + served_outputs.REPEATED + 3
    with pytest.raises(UserError):
        columns(language, server, attempts=2)
    server.last, server.down, server.model = None, False, model_of(language, seed=5)
    assert "sent again" in refusal(language, server)


def test_the_finished_outputs_need_no_server(language, server):
    first = joined(columns(language, server, served_model="teacher"))
    server.down = True
    again = joined(columns(language, server, attempts=1, served_model="teacher"))
    assert all(first[name].equals(again[name]) for name in first)


# ---- faults that end a run, each in one sentence


def refusal(made, server, **changes):
    with pytest.raises(UserError) as caught:
        columns(made, server, **changes)
    text = str(caught.value)
    assert "\n" not in text
    assert not list(store.cache_root().glob("outputs/*"))
    return text


def test_a_server_that_is_down(language, server):
    server.down = True
    assert server.url in refusal(language, server, attempts=2)


def test_a_server_that_is_not_there(language, server):
    server.url = "http://127.0.0.1:9/v1"
    assert "127.0.0.1:9" in refusal(language, server, attempts=2)


def test_more_tokens_than_the_server_lists(language, server):
    server.limit = 5
    text = refusal(language, server)
    assert "max_logprobs is 5" in text
    assert f"teacher.tokens is {TOKENS}" in text


def test_fewer_tokens_than_requested(language, server):
    server.fewer = 4
    assert f"instead of {TOKENS}" in refusal(language, server)


def test_stale_values(language, server):
    server.stale = True
    assert "--no-enable-prefix-caching" in refusal(language, server)


def test_values_that_become_stale_later(language, server, monkeypatch):
    """Each chunk is checked before it is stored."""
    check, calls = server_checks.check_repeated, []

    def then_stale(url, *pairs):
        calls.append(check(url, *pairs))
        server.stale = True
        return calls[-1]

    monkeypatch.setattr(served_outputs, "check_repeated", then_stale)
    assert "--no-enable-prefix-caching" in refusal(language, server)
    assert len(calls) == 1


def test_another_tokenizer(language, server):
    words = [chr(65 + place % 26) * (1 + place // 26) for place in range(len(language.tokenizer))]
    server.tokenizer = type("Other", (), {"decode": lambda self, ids: words[ids[0]]})()
    assert "another tokenizer" in refusal(language, server)


def test_tokens_that_do_not_exist_here(language, server):
    torch.manual_seed(1)
    server.model = models.load(
        None,
        language.run.teacher.config | {"vocab_size": len(language.tokenizer) + 50},
        language.task,
        "teacher",
    )
    with torch.no_grad():
        server.model.get_output_embeddings().weight[-50:] *= 50
    assert f"has {len(language.tokenizer)} tokens" in refusal(language, server)


def test_a_teacher_that_is_confidently_wrong(language, server):
    with torch.no_grad():
        server.model.get_output_embeddings().weight.mul_(300)
    assert "nats per token" in refusal(language, server)


def test_a_model_that_is_not_served(language, server):
    server.names = ["one", "two"]
    assert "one, two" in refusal(language, server)
    assert "three" in refusal(language, server, served_model="three")
    assert columns(language, server, served_model="two").num_rows == EXAMPLES


def test_examples_that_are_too_long(language, server):
    server.length = 10
    text = refusal(language, server)
    assert "max_model_len is 10" in text


def test_the_key_comes_from_the_environment(language, server, monkeypatch):
    server.key = "secret"
    assert "DISTILL_TEACHER_KEY" in refusal(language, server)
    monkeypatch.setenv(KEY, "secret")
    assert columns(language, server).num_rows == EXAMPLES


# ---- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"outputs": "served"}}, "teacher.url is not set"),
        ({"teacher": {"url": "http://h/v1", "model": "m"}}, "teacher.outputs is cached"),
        ({"teacher": {"outputs": "served", "url": "h:80"}}, "teacher.url is h:80"),
        ({"teacher": {"outputs": "served", "url": "http://me:pw@h/v1"}}, "user or password"),
        (
            {"teacher": {"outputs": "served", "url": "http://h/v1", "finetune": {"epochs": 1}}},
            "teacher.finetune is set",
        ),
        ({"loss": {"temperature": 2.0}}, "loss.temperature is 2"),
        ({"loss": {"temperature": 1.0, "divergence": "reverse_kl"}}, "loss.divergence is"),
        ({"student": {"layers": [0]}, "loss": {"temperature": 1.0}}, "student.layers is"),
    ],
)
def test_a_recipe_that_a_served_teacher_cannot_do(changes, message):
    base = {
        "task": LANGUAGE["task"],
        "data": LANGUAGE["data"],
        "teacher": None,
        "student": {"layers": None, "model": "m"},
    }
    teacher_section = {"outputs": "served", "url": "http://127.0.0.1:1/v1"}
    with pytest.raises(UserError, match=message) as caught:
        section = changes.get("teacher", teacher_section)
        config.Teacher(**section) if "teacher" in changes else tiny(
            **base | {"teacher": teacher_section | {"config": None}} | changes
        )
    assert "pw" not in str(caught.value).replace("password", "")


def test_the_perplexity_of_one_token_is_known():
    result = TokenLogProbs(
        np.array([[1, 2]], np.int32),
        np.log(np.array([[0.5, 0.25]], np.float32)),
        np.log(np.array([0.125], np.float32)),
    )
    assert server_checks.mean_loss([result]) == pytest.approx(math.log(8))
    assert result.distances(result).tolist() == [0.0]
