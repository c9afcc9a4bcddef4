"""Costs of models: bytes on disk, and two models measured side by side."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill import isolated
from distill.evaluate import cost
from tests.unit import tiny_runs


def test_bytes_on_disk_are_those_of_all_files(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "inner" / "b").write_bytes(b"4567")
    (tmp_path / "manifest.json").write_bytes(b"of our store, not of the model")
    assert cost.disk_bytes(tmp_path) == 7


def bert(layers, folder):
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


def check_cost(measured, model, folder):
    assert measured.parameters == sum(parameter.numel() for parameter in model.parameters())
    buffers = measured.weight_bytes - 4 * measured.parameters
    assert 0 <= buffers < 1000
    assert measured.disk_bytes == cost.disk_bytes(folder) > 4 * measured.parameters
    latencies = [measured.latency_p50_ms, measured.latency_p90_ms, measured.latency_p99_ms]
    assert latencies[0] > 0
    assert latencies == sorted(latencies)
    assert measured.tokens_per_s == pytest.approx(3.5 * measured.examples_per_s)
    memory = [
        measured.memory_before_bytes,
        measured.memory_loaded_bytes,
        measured.memory_peak_bytes,
    ]
    assert memory[0] > 50 << 20
    assert memory == sorted(memory)


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_models_are_measured_side_by_side(tmp_path, monkeypatch, own_process):
    if not own_process:
        monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    models = {"teacher": bert(4, tmp_path / "teacher"), "student": bert(1, tmp_path / "student")}
    folders = {name: tmp_path / name for name in models}
    request = {"input_ids": [[2, 5, 6, 3]], "attention_mask": [[1, 1, 1, 1]]}
    batch = {
        "input_ids": [[2, 5, 6, 3], [2, 5, 3, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
    }
    inputs = dict.fromkeys(models, cost.TimedInputs([request] * 20, [batch] * 4))
    costs, machine = cost.measure_costs(
        cost.model_request(folders, "AutoModelForSequenceClassification", 1, "cpu"), inputs
    )
    for name, model in models.items():
        check_cost(costs[name], model, folders[name])
    assert costs["student"].latency_p50_ms < costs["teacher"].latency_p50_ms
    assert (machine.threads, machine.dtype, machine.torch) == (1, "float32", torch.__version__)
    assert (machine.requests, machine.batches) == (20, 4)
    assert machine.warm_up.keys() == machine.turn.keys() == {"requests", "batches"}
