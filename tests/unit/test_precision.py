"""The float type of exports and measurements, and how an export with fewer bits is judged."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from distill import models
from distill.evaluate import outcomes
from distill.recipe import config
from distill.tasks import CausalLanguageModelling, MultiLabelClassification, comparison
from tests.unit.test_large_models import batch_of, llama
from tests.unit.tiny_runs import classifier

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def checkpoint(folder, dtype):
    model = BertModel(BertConfig(intermediate_size=16, **SMALL)).to(dtype)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_of_the_teacher_s_checkpoint(tmp_path, dtype, declared):
    teacher = config.Teacher(model=checkpoint(tmp_path, getattr(torch, dtype)))
    student = config.Student(layers=[0])
    if not declared:
        file = tmp_path / "config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({key: settings[key] for key in settings if key != "dtype"}))
    for format, expected in (
        ("dense", dtype),
        ("packed", dtype),
        (None, dtype),
        ("onnx", "float32"),
    ):
        resolved = models.resolve_export_dtype(config.Export(format=format), teacher, student)
        assert resolved.dtype == expected
    asked = config.Export(dtype="float32")
    assert models.resolve_export_dtype(asked, teacher, student) == asked


def test_auto_of_models_from_configs_is_float32(tmp_path):
    teacher, student = config.Teacher(config={"model_type": "bert"}), config.Student(layers=[0])
    assert models.resolve_export_dtype(config.Export(), teacher, student).dtype == "float32"
    alone = config.Student(model=checkpoint(tmp_path, torch.bfloat16))
    assert models.resolve_export_dtype(config.Export(), None, alone).dtype == "bfloat16"


def test_compressed_models_are_measured_in_float32(tmp_path):
    for content, expected in (
        ({}, "bfloat16"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "float32"),
        ({"quantization_config": {"quant_type": "int8"}}, "float32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert models.measured_dtype(tmp_path, "bfloat16") == expected


# ---- an export with fewer bits


def answers_of(model, batch):
    """What the isolated proof returns of a model."""
    ids = batch.inputs["input_ids"]
    with torch.inference_mode():
        logits_LV = model(input_ids=ids).logits[0].float()
    top = logits_LV.max(-1)
    return {
        "ids": ids[0].tolist(),
        "next": top.indices.tolist(),
        "top": top.values.tolist(),
        "logsumexp": logits_LV.logsumexp(-1).tolist(),
    }


def compared(damage, seed=0):
    """A random language model's export in bfloat16, compared with the model in float32."""
    torch.manual_seed(seed)
    task = CausalLanguageModelling(max_length=256)
    student = llama(4000, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    batch = batch_of(task, 1, 256)
    export = llama(4000, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    export.load_state_dict(student.state_dict())
    for tensor in export.parameters():
        tensor.data.add_(damage * tensor.data.abs().mean() * torch.randn_like(tensor))
    rows = models.logits(student, batch.inputs).detach()[0]
    answers = [answers_of(export.bfloat16(), batch)]
    return task.compare(answers, [batch], [rows], student.config)


def test_what_bfloat16_cannot_tell_is_counted_apart():
    result = compared(damage=0)
    assert result.agreement < 0.99
    ties = result.near_ties["bfloat16"]
    assert ties > 0
    assert result.agreement + ties / result.rows >= 0.99
    assert result.near_ties["float16"] < ties


def test_a_damaged_export_is_not_excused():
    result = compared(damage=0.3)
    assert result.agreement + result.near_ties["bfloat16"] / result.rows < 0.95


@pytest.mark.parametrize(
    ("student", "export", "ties"),
    [
        ([4.0, 4.01, 0.0], [4.01, 4.0, 0.0], 1),
        ([4.0, 4.1, 0.0], [4.1, 4.0, 0.0], 0),
        ([4.0, 4.01, 0.0], [0.0, 0.0, 4.0], 0),
    ],
)
def test_classes_nearer_than_bfloat16_can_tell_are_ties(student, export, ties):
    task = classifier("a", "b", "c")
    result = task.compare_rows(torch.tensor([export]), torch.tensor([student]))
    assert (result.agreement, result.near_ties["bfloat16"]) == (0.0, ties)


def test_labels_whose_sign_bfloat16_cannot_tell_are_ties():
    task = classifier("a", "b", kind=MultiLabelClassification)
    near, far = ([[9.0, 0.02]], [[9.0, -0.02]]), ([[9.0, 0.2]], [[9.0, -0.2]])
    for (student, export), ties in ((near, 1), (far, 0)):
        result = task.compare_rows(torch.tensor(export), torch.tensor(student))
        assert (result.agreement, result.near_ties["bfloat16"]) == (0.0, ties)


def test_spacing_is_that_of_neighbouring_numbers():
    for dtype, spacing in comparison.SPACING.items():
        one = torch.ones((), dtype=getattr(torch, dtype))
        above = torch.nextafter(one, torch.tensor(2.0, dtype=one.dtype))
        assert float(above - one) == spacing


# ---- one model on the device at a time


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_models_in_turn_have_the_outcomes_of_models_side_by_side(monkeypatch, tokens):
    torch.manual_seed(0)
    task = CausalLanguageModelling(max_length=16)
    settings = LlamaConfig(intermediate_size=16, num_key_value_heads=1, pad_token_id=0, **SMALL)
    loaded = {name: LlamaForCausalLM(settings).eval() for name in ("teacher", "student")}
    batches = [dict.fromkeys(loaded, batch_of(task, texts, 9)) for texts in (3, 2, 4)]
    together = outcomes.collect_outcomes(task, loaded, batches)
    monkeypatch.setattr(outcomes, "fits_device", lambda *_: False)
    monkeypatch.setattr(outcomes, "GROUP_TOKENS", tokens)
    in_turn = outcomes.collect_outcomes(task, loaded, batches)
    torch.testing.assert_close(in_turn[0], together[0], rtol=0, atol=0)
    assert in_turn[1] == together[1]
    assert math.isfinite(in_turn[1]["student"].divergence)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_chunks_do_not_change_outcomes(monkeypatch, rows):
    """Logits from hidden states, some rows at a time, equal the model's own to rounding."""
    torch.manual_seed(0)
    task = CausalLanguageModelling(max_length=16)
    settings = LlamaConfig(intermediate_size=16, num_key_value_heads=1, pad_token_id=0, **SMALL)
    loaded = {name: LlamaForCausalLM(settings).eval() for name in ("teacher", "student")}
    both = dict.fromkeys(loaded, batch_of(task, 4, 9))
    whole = outcomes.collect_outcomes(task, loaded, [both])
    monkeypatch.setattr("distill.losses.chunk_sizes.CHUNK_BYTES", 4 * 50 * rows)
    chunks = outcomes.collect_outcomes(task, loaded, [both])
    torch.testing.assert_close(chunks[0], whole[0], rtol=1e-5, atol=1e-6)
    assert chunks[1]["student"].agreement == whole[1]["student"].agreement
    assert chunks[1]["student"].divergence == pytest.approx(
        whole[1]["student"].divergence, rel=1e-4
    )
