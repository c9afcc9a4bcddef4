"""Requests in forks of one process that has imported torch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from distill import isolated
from distill.evaluate import cost
from distill.isolated import warm

pytestmark = pytest.mark.skipif(not warm.is_supported(), reason="forks a process with torch")
CLASS = "AutoModelForSequenceClassification"


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = BertConfig(vocab_size=4000, intermediate_size=64, **sizes)
    BertForSequenceClassification(settings).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def measured(folder):
    request = {"input_ids": [[2, 5, 6, 3]], "attention_mask": [[1, 1, 1, 1]]}
    inputs = {"student": cost.TimedInputs([request] * 3, [request] * 2)}
    return cost.measure_costs(cost.model_request({"student": folder}, CLASS, 1, "cpu"), inputs)


@pytest.mark.slow
def test_forks_measure_what_new_processes_measure(folder):
    alone, machine = measured(folder)
    with isolated.warm_process(CLASS, 1):
        process = warm.current("model_memory", 1)
        costs, forked_machine = measured(folder)
        assert process.process.poll() is None
    assert process.process.returncode is not None
    assert forked_machine == machine
    fork, new = costs["student"], alone["student"]
    assert (fork.parameters, fork.weight_bytes) == (new.parameters, new.weight_bytes)
    for name in ("memory_before_bytes", "memory_loaded_bytes", "memory_peak_bytes"):
        assert getattr(fork, name) == pytest.approx(getattr(new, name), rel=0.1)


@pytest.mark.slow
def test_what_fails_in_a_fork_fails_with_the_error_of_a_new_process(tmp_path):
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text('{"model_type": "nowhere"}')
    with (
        isolated.warm_process(CLASS, 1),
        pytest.raises(isolated.ProcessError, match="nowhere"),
    ):
        measured(tmp_path / "nowhere")


def test_only_scripts_with_torch_and_the_same_threads_are_run_in_forks():
    process = warm.WarmProcess([sys.executable, "-c", "pass"], dict(os.environ), {}, 2)
    with warm.keep(process):
        assert warm.current("model_memory", 2) is process
        assert warm.current("model_memory", 1) is None
        assert warm.current("program_proof", 2) is None
    assert warm.current("model_memory", 2) is None


def test_a_process_that_has_ended_answers_nothing(tmp_path):
    process = warm.WarmProcess([sys.executable, "-c", "pass"], dict(os.environ), {}, 1)
    process.process.wait()
    assert not process.run_script("model_memory", tmp_path / "request", tmp_path / "response")
    process.close()
    assert not Path(process.folder.name).exists()


SERVER = f"""
import sys
sys.path.insert(0, {str(Path(isolated.__file__).parent)!r})
import fork_server
fork_server._import = lambda _: None
def answer(script, request, response):
    if script == "killed":
        import os
        os.kill(os.getpid(), 9)
    if script == "failed":
        raise ValueError
    if script == "slow":
        import os, time
        response.write_text(str(os.getpid()))
        time.sleep(60)
    response.write_text(script)
fork_server.serve(sys.argv[1], answer)
"""


@pytest.fixture
def server():
    settings = {"packages": [], "auto_class": ""}
    process = warm.WarmProcess([sys.executable, "-c", SERVER], dict(os.environ), settings, 1)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("script", "succeeds"), [("ok", True), ("killed", False), ("failed", False)]
)
def test_a_fork_reports_how_it_ended(server, tmp_path, script, succeeds):
    files = tmp_path / "request", tmp_path / "response"
    assert server.run_script(script, *files) == succeeds
    assert files[1].exists() == succeeds
    assert server.run_script("ok", *files)


def test_a_script_ends_with_its_request(server, tmp_path):
    request, response = tmp_path / "request", tmp_path / "response"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.address)
        connection.sendall(json.dumps(["slow", str(request), str(response)]).encode())
        connection.shutdown(socket.SHUT_WR)
        while not response.exists() or not response.read_text():
            time.sleep(0.01)
    process = Path("/proc", response.read_text())
    for _ in range(1000):
        if not process.exists():
            break
        time.sleep(0.01)
    assert not process.exists()


def test_the_path_of_temporary_files_may_be_long(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    process = warm.WarmProcess([sys.executable, "-c", "pass"], dict(os.environ), {}, 1)
    process.close()
    assert not list(long.iterdir())


def test_the_process_ends_with_its_parent(server):
    server.process.stdin.close()
    assert server.process.wait(20) == 0


def test_an_interrupted_process_ends(server, tmp_path):
    assert server.run_script("ok", tmp_path / "request", tmp_path / "response")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == -signal.SIGINT


def test_pages_of_libraries_are_found():
    code = (
        SERVER.partition("fork_server._import")[0] + "print(len(fork_server.resident_file_pages()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 100 < int(process.stdout) < 100_000
