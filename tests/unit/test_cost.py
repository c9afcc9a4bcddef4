"""Costs are measured fairly, alone, and of the right things."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill import isolated
from distill.evaluate import cost
from tests.unit import tiny_runs

SCRIPT = Path(cost.__file__)


class Recorder(torch.nn.Module):
    """Notes its calls in a list that models share; takes no token types."""

    device = torch.device("cpu")

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, input_ids, use_cache=True):
        assert not use_cache
        self.calls.append(f"{self.name}{int(input_ids[0, 0])}")


def inputs(*numbers):
    return [
        {"input_ids": torch.tensor([[number]]), "token_type_ids": torch.zeros(1, 1)}
        for number in numbers
    ]


def test_models_take_turns_and_the_warm_up_is_not_timed():
    calls: list[str] = []
    models = {"a": Recorder("a", calls), "b": Recorder("b", calls)}
    seconds = cost.interleaved(models, dict.fromkeys(models, inputs(0, 1, 2)), warm_up=1)
    assert calls == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_a_turn_may_be_of_several_calls():
    calls: list[str] = []
    models = {"a": Recorder("a", calls), "b": Recorder("b", calls)}
    cost.interleaved(models, dict.fromkeys(models, inputs(0, 1, 2)), turn=2)
    assert calls == ["a0", "a1", "b0", "b1", "b2", "a2"]


def test_throughput_counts_tokens_without_padding():
    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    assert cost._throughput([2.0], [batch]) == {"examples_per_s": 1.0, "tokens_per_s": 3.0}
    assert cost._throughput([1.0, 1.0, 100.0], [batch] * 3)["examples_per_s"] == 2.0


def test_latency_is_in_milliseconds():
    assert cost._latency([0.001] * 9 + [0.101]) == pytest.approx(
        {"latency_p50_ms": 1, "latency_p90_ms": 11, "latency_p99_ms": 92}, rel=0.01
    )


def test_bytes_on_disk_are_those_of_all_files(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "inner" / "b").write_bytes(b"4567")
    (tmp_path / "manifest.json").write_bytes(b"of our store, not of the model")
    assert cost.disk_bytes(tmp_path) == 7


def test_a_process_does_not_report_the_memory_of_the_one_that_started_it():
    weight = bytearray(400 << 20)
    weight[:: 1 << 12] = b"1" * len(weight[:: 1 << 12])  # every page is used
    code = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['peak_memory']())"
    peak = int(
        subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert peak < 200 << 20 < cost.peak_memory()


def test_the_measuring_script_needs_none_of_ours(tmp_path):
    loaded = "sorted({'torch', 'distill', 'datasets', 'lightning'} & set(sys.modules))"
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print({loaded})"
    said = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert said == "[]\n"


def test_a_script_that_fails_says_its_last_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('noise')\nsys.exit('no such model')\n")
    with pytest.raises(isolated.ProcessError, match=r"^no such model$"):
        isolated.run_isolated(script, {"threads": 1})


def test_a_script_answers_from_an_empty_folder_and_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\nquestion = json.load(open(sys.argv[1]))\nprint('noise')\n"
        "answer = {'twice': 2 * question['x'], 'here': os.listdir(), 'offline': os.environ['HF_HUB_OFFLINE']}\n"
        "json.dump(answer, open(sys.argv[2], 'w'))\n"
    )
    assert isolated.run_isolated(script, {"x": 4, "threads": 1}) == {
        "twice": 8,
        "here": ["question.json"],
        "offline": "1",
    }


def tiny(layers, folder):
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_models_are_measured_side_by_side(tmp_path, monkeypatch, own_process):
    if not own_process:
        monkeypatch.setattr(isolated, "run_isolated", tiny_runs.ask_here)
    models = {"teacher": tiny(4, tmp_path / "teacher"), "student": tiny(1, tmp_path / "student")}
    folders = {name: tmp_path / name for name in models}
    request = {"input_ids": [[2, 5, 6, 3]], "attention_mask": [[1, 1, 1, 1]]}
    batch = {
        "input_ids": [[2, 5, 6, 3], [2, 5, 3, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }
    costs, machine = cost.measure(
        folders,
        "AutoModelForSequenceClassification",
        [request] * 20,
        [batch] * 4,
        threads=1,
        device="cpu",
    )
    for name, model in models.items():
        found = costs[name]
        assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert (
            4 * found["parameters"] <= found["weight_bytes"] < 4 * found["parameters"] + 1000
        )  # and a few buffers
        assert found["disk_bytes"] == cost.disk_bytes(folders[name]) > 4 * found["parameters"]
        assert 0 < found["latency_p50_ms"] <= found["latency_p90_ms"] <= found["latency_p99_ms"]
        assert found["tokens_per_s"] == pytest.approx(3.5 * found["examples_per_s"])
        assert (
            50 << 20
            < found["memory_before_bytes"]
            <= found["memory_loaded_bytes"]
            <= found["memory_peak_bytes"]
        )
    assert costs["student"]["latency_p50_ms"] < costs["teacher"]["latency_p50_ms"]
    assert machine["threads"] == 1
    assert machine["dtype"] == "float32"
    assert machine["torch"] == torch.__version__
    assert (machine["requests"], machine["batches"]) == (20, 4)
    json.dumps([costs, machine], allow_nan=False)
