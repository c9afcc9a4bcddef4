"""Completions that a server writes with the student's weights: stored, and resumed from."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from distill import models, resume, student
from distill.errors import UserError
from distill.models import adapters
from distill.processes import ranks
from distill.recipe import config
from distill.served import Client, client, connect_writer
from distill.train import train
from distill.training import checkpoints, served_writer
from tests.completion_server import serve_completions
from tests.integration.test_on_policy_runs import (
    Interrupted,
    interrupted,
    prepared,
    trained,
    with_adapter,
)
from tests.processes import on_ranks
from tests.worlds import LLAMA, tiny

COMPLETE, *ADAPTERS = KINDS = ("sglang", "vllm", "sglang with an adapter")
SLOW = [COMPLETE, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ADAPTERS)]
PROBES = served_writer._PROBES  # requests that compare the server with the student


def first_student(made):
    """The student before training."""
    torch.manual_seed(0)
    spec = made.run.teacher
    teacher = models.load(spec.model, spec.config, made.task, "teacher", made.tokenizer)
    return student.build_student(made.run.student, made.prepared, teacher, False)[0].eval()


def run_of(kind, folder, **loss):
    """A run of 9 steps, of which each second is on-policy, and its student before training."""
    made = prepared(**{"on_policy": 0.5} | loss)
    if kind == "sglang":
        return made, first_student(made)
    pytest.importorskip("peft")
    made = with_adapter(made, folder / "base")
    name = str(folder / "base")
    return made, models.load(name, None, made.task, "student", made.tokenizer).eval()


@pytest.fixture(params=KINDS)
def served(request, tmp_path):
    """A run whose completions a server writes, and the server."""
    made, initial = run_of(request.param, tmp_path)
    with serve_completions(initial, made.tokenizer, request.param.split()[0]) as server:
        made.run.loss.completions_url = server.url
        yield made, server


@pytest.fixture
def complete(tmp_path):
    """The same of complete weights."""
    made, initial = run_of(COMPLETE, tmp_path)
    with serve_completions(initial, made.tokenizer, COMPLETE) as server:
        made.run.loss.completions_url = server.url
        yield made, server


def stored(folder):
    """The completions of each step and rank."""
    files = sorted(folder.glob("completions/step-*.json"))
    return {file.name: json.loads(file.read_text())["ids"] for file in files}


@pytest.mark.parametrize("served", SLOW, indirect=True)
def test_an_interrupted_run_repeats_its_steps_with_the_completions_it_had(
    served, tmp_path, monkeypatch
):
    made, server = served
    monkeypatch.setattr(served_writer.ServedWriter, "_remove_completions", lambda *_: None)
    result = interrupted(made, tmp_path / "cut", 7)  # at a step whose completions are written
    written = stored(tmp_path / "cut")
    assert [name[:13] for name in written] == [f"step-{step:08d}" for step in (1, 3, 5, 7)]
    # What went on needed no request.
    assert len(server.requests) == sum(map(len, written.values())) + PROBES
    # A run that is not interrupted and gets the same completions takes the same steps.
    shutil.copytree(tmp_path / "cut" / "completions", tmp_path / "complete" / "completions")
    server.requests.clear()
    assert trained(made, tmp_path / "complete") == result
    assert not server.requests


def killed(made, folder, step):
    """Interrupt a training at the start of a step, whose completions are written, and before its
    first checkpoint."""
    made.run.trainer = replace(
        made.run.trainer, validations=1, checkpoint=config.Checkpoint(steps=99)
    )

    def raising(self, trainer, *_):
        if trainer.global_step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoints.PerBatchSeed, "on_train_batch_start", raising)
        trained(made, folder)


def test_a_run_that_is_killed_before_its_first_checkpoint_has_the_same_completions(
    complete, tmp_path
):
    made, server = complete
    killed(made, tmp_path, 1)
    written = stored(tmp_path)
    assert [*written] == ["step-00000001-rank-0-of-1.json"]
    killed(made, tmp_path, 3)
    repeated = stored(tmp_path)
    assert [*repeated] == [f"step-0000000{step}-rank-0-of-1.json" for step in (1, 3)]
    assert not [*tmp_path.glob("checkpoints/*.ckpt")]
    assert written.items() <= repeated.items()
    assert len(server.requests) == sum(map(len, repeated.values())) + 2 * PROBES


def lost(made, folder):
    """Remove the first completions: what was written after them is another student's."""
    (folder / "completions" / "step-00000001-rank-0-of-1.json").unlink()


def longer(made, folder):
    """Train for more steps: the learning rate of each is another."""
    made.run.trainer.max_steps += 1


@pytest.mark.parametrize("change", [lost, longer])
def test_completions_of_another_student_are_requested_again(change, complete, tmp_path):
    made, server = complete
    killed(made, tmp_path, 3)
    before = stored(tmp_path)
    change(made, tmp_path)
    killed(made, tmp_path, 1)  # the later ones must not be there any more
    assert [*stored(tmp_path)] == ["step-00000001-rank-0-of-1.json"]
    killed(made, tmp_path, 3)
    after = stored(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    assert server.loaded == ["weights-0", "weights-1"] * 2
    _, former, _, latter = server.states
    assert any(not torch.equal(former[name], latter[name]) for name in latter)


def test_the_weights_of_a_version_are_those_of_its_first_step_after_a_restart(tmp_path):
    made, initial = run_of(COMPLETE, tmp_path, on_policy=1.0, completions_every=3)
    with serve_completions(initial, made.tokenizer, COMPLETE) as server:
        made.run.loss.completions_url = server.url
        killed(made, tmp_path / "run", 4)
        killed(made, tmp_path / "run", 5)
    assert server.loaded == ["weights-0", "weights-1", "weights-1"]
    _, first, again = server.states
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_keeps_its_server_or_gets_another_one_but_is_not_left_without(tmp_path):
    def opened(**loss):
        return resume.open_run_folder(tiny(**LLAMA, loss={"on_policy": 0.5, **loss}), tmp_path)

    opened(completions_url="http://one/v1")
    opened(completions_url="http://other/v1")
    with pytest.raises(UserError, match="loss.completions_url was http://one/v1 and is null"):
        opened()


def test_the_server_writes_with_the_student_s_weights_of_the_step(served, tmp_path, monkeypatch):
    made, server = served
    made.run.loss.sampling_temperature = 0.0
    call, expected, here, there = served_writer.ServedWriter.__call__, [], [], []

    def recorded(writer, step, prompts, sampling, seeds):
        merged = copy.deepcopy(writer.student)
        adapters.merge(merged)
        expected.append(merged.state_dict())
        for group, drawn in zip(prompts, seeds, strict=True):
            here.extend(models.write_completions(writer.student, group, sampling, drawn))
        there.extend(
            each for group in call(writer, step, prompts, sampling, seeds) for each in group
        )
        return call(writer, step, prompts, sampling, seeds)

    monkeypatch.setattr(served_writer.ServedWriter, "__call__", recorded)
    trained(made, tmp_path / "run")
    assert len(expected) == len(server.states) == 4
    for ours, theirs in zip(expected, server.states, strict=True):
        assert all(torch.allclose(ours[name], each, atol=1e-6) for name, each in theirs.items())
    assert here == there
    assert not server.adapters  # they are unloaded
    assert len([*(tmp_path / "run" / "completions").glob("weights-*")]) == 1


def test_the_server_gets_the_weights_every_few_steps(tmp_path):
    made, initial = run_of("sglang", tmp_path, completions_every=3)
    with serve_completions(initial, made.tokenizer, "sglang") as server:
        made.run.loss.completions_url = server.url
        trained(made, tmp_path / "run")
        assert server.loaded == ["weights-0", "weights-1"]  # 4 on-policy steps


def test_completions_before_every_checkpoint_are_removed(tmp_path):
    made, initial = run_of("sglang", tmp_path)
    made.run.trainer.checkpoint.keep = 1
    with serve_completions(initial, made.tokenizer, "sglang") as server:
        made.run.loss.completions_url = server.url
        trained(made, tmp_path / "run")
    assert [*stored(tmp_path / "run")] == ["step-00000007-rank-0-of-1.json"]


# ---- faults


def strange(server):
    server.strange = 10**6


def short(server):
    server.length_limit = 2


def another_model(server):
    for parameter in server.model.parameters():
        parameter.data = torch.randn_like(parameter)
    server.update_weights_from_disk = lambda body: (200, {"success": True})


def without_ids(server):
    server.generate = lambda body: (200, {"text": "", "meta_info": {}})


def without_its_path(server):
    server.generate = None


def other_end(server):
    server.end = 5


def refusing(server):
    server.update_weights_from_disk = lambda body: (200, {"success": False, "message": "shapes"})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (strange, "writes token 1000000"),
        (short, "ends a completion at token"),
        (another_model, "is not the student"),
        (refusing, "shapes"),
        (without_ids, "gives no token ids"),
        (without_its_path, "refuses a prompt .*404"),
        (other_end, "ends a completion at token 5, .* add the token to eos_token_id"),
    ],
)
def test_a_server_that_is_no_student_s_is_one_sentence(fault, words, tmp_path):
    made, initial = run_of("sglang", tmp_path)
    with serve_completions(initial, made.tokenizer, "sglang") as server:
        made.run.loss.completions_url = server.url
        fault(server)
        with pytest.raises(UserError, match=f"loss.completions_url is .*{words}"):
            trained(made, tmp_path / "run")


def test_the_key_of_a_server_is_sent_with_each_request(complete, tmp_path, monkeypatch):
    made, server = complete
    server.key = "secret"
    with pytest.raises(UserError, match=f"{client.KEY} where it needs one"):
        trained(made, tmp_path)
    monkeypatch.setenv(client.KEY, "secret")
    killed(made, tmp_path, 1)
    assert stored(tmp_path)
    assert not any(
        "secret" in str(file.read_bytes()) for file in files_of(tmp_path / "completions")
    )


def test_an_end_of_the_server_s_model_ends_no_completion_of_vllm(tmp_path):
    made, initial = run_of("vllm", tmp_path)
    with serve_completions(initial, made.tokenizer, "vllm") as server:
        made.run.loss.completions_url = server.url
        server.end = 5
        killed(made, tmp_path / "run", 1)


def files_of(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def test_a_busy_server_is_sent_the_same_again(tmp_path, monkeypatch):
    made, initial = run_of("sglang", tmp_path)
    connect = served_writer.connect_writer

    def patient(client):
        return connect(Client(client.url, client.setting, delay=0.002))

    monkeypatch.setattr(served_writer, "connect_writer", patient)
    with serve_completions(initial, made.tokenizer, "sglang") as server:
        made.run.loss.completions_url = server.url
        server.busy, server.cut, server.garbled = 3, 2, 2
        trained(made, tmp_path / "run")
        assert (server.busy, server.cut, server.garbled) == (0, 0, 0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_whose_load_was_answered_into_a_lost_connection_is_there(
    kind, tmp_path, monkeypatch
):
    made, initial = run_of(kind, tmp_path)
    monkeypatch.setattr(client, "_FIRST_DELAY", 0.002)
    with serve_completions(initial, made.tokenizer, kind.split()[0]) as server:
        made.run.loss.completions_url = server.url
        server.lost = ["load_lora_adapter"]
        killed(made, tmp_path / "run", 1)
        assert not server.lost
        assert len(server.adapters) == 1


@pytest.mark.parametrize(
    ("kind", "words"), [("vllm", "student.lora.rank"), ("llamacpp", "says that it is llamacpp")]
)
def test_servers_that_load_no_complete_weights_are_refused_first(kind, words, tmp_path):
    made, initial = run_of("sglang", tmp_path)
    with serve_completions(initial, made.tokenizer, kind) as server:
        run = tiny(**LLAMA, loss={"on_policy": 0.5, "completions_url": server.url})
        with pytest.raises(UserError, match=words):
            train(run, tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_server_that_is_down_is_named_before_the_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(served_writer, "Client", lambda *names, attempts: Client(*names, 1, 1.0))
    run = tiny(**LLAMA, loss={"on_policy": 0.5, "completions_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(UserError, match="loss.completions_url is http://127.0.0.1:9/v1"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_vllm_without_adapters_at_runtime_says_how_to_start_it(tmp_path, monkeypatch):
    made, initial = run_of("vllm", tmp_path)
    with serve_completions(initial, made.tokenizer, "vllm") as server:
        server.load_lora_adapter = None
        made.run.loss.completions_url = server.url
        with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            trained(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"on_policy": 0.5, "completions_url": "here"}, "loss.completions_url is here"),
        ({"completions_url": "http://h/v1"}, "loss.on_policy is 0"),
        ({"on_policy": 0.5, "completions_every": 0}, "loss.completions_every is 0"),
    ],
)
def test_settings_that_do_nothing_are_refused(loss, words):
    with pytest.raises(UserError, match=words):
        config.Loss(**loss)


def test_a_callback_that_compresses_is_refused(tmp_path):
    loss = {"on_policy": 0.5, "completions_url": "http://127.0.0.1:9/v1"}
    quantize = {"_target_": "distill.callbacks.Quantize"}
    with pytest.raises(UserError, match="callbacks.quantize"):
        train(tiny(**LLAMA, loss=loss, callbacks={"quantize": quantize}), tmp_path / "run")


# ---- two ranks


def on_two_ranks(folder):
    made, _ = run_of((folder / "kind").read_text(), folder)
    made.run.loss.completions_url = (folder / "url").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_writer.ServedWriter, "_remove_completions", lambda *_: None)
        result = interrupted(made, folder / "cut", 7)
        if ranks.is_rank_zero():
            shutil.copytree(folder / "cut" / "completions", folder / "complete" / "completions")
        ranks.barrier()
        return result, trained(made, folder / "complete")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [COMPLETE, "vllm"])
def test_each_rank_stores_its_completions(kind, tmp_path):
    made, initial = run_of(kind, tmp_path)
    with serve_completions(initial, made.tokenizer, kind) as server:
        (tmp_path / "url").write_text(server.url)
        (tmp_path / "kind").write_text(kind)
        results = on_ranks(on_two_ranks, tmp_path, 2)
    assert len({each for rank in results for each in rank}) == 1
    names = [*stored(tmp_path / "cut")]
    assert names[:2] == [f"step-00000001-rank-{rank}-of-2.json" for rank in (0, 1)]


def test_the_client_of_a_writer_names_its_key():
    with pytest.raises(UserError, match="loss.completions_url is http://127.0.0.1:9/v1"):
        connect_writer(Client("http://127.0.0.1:9/v1", served_writer.SETTING, 1, 1.0))
