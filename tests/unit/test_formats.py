"""Exports in torchao's format, what it does not support, and quantization after training."""

import json

import pytest
import torch
import transformers
from datasets import DatasetDict

from distill import export, isolated, models, packing
from distill.compress.quantizer import QuantSpec
from distill.errors import UserError
from distill.evaluate import cost
from distill.export import command
from distill.packing import ExportSpec, export_spec, packed, post_training
from distill.prepare import Prepared
from distill.recipe import compose, config
from distill.remote_code import container, modeling
from distill.remote_code.modeling import CompressionConfig
from distill.tasks import CausalLanguageModelling
from tests import worlds
from tests.unit import tiny_runs
from tests.unit.test_packing import RESHAPED, answers, plainly, reshaped, shipped
from tests.unit.tiny_runs import classifier, exported, made, quantized

DYNAMIC = {"bits": 8, "range": None}


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)


@pytest.fixture
def ready(tmp_path):
    return made(tmp_path, classifier("no", "perhaps", "yes"), "distilbert")


def proven(ready, **settings):
    ready[0].export = config.Export(**settings)
    final = exported(*ready)
    return final, json.loads((final / "proof.json").read_text())


@pytest.mark.parametrize("model_type", ["distilbert", "bert"])
@pytest.mark.parametrize("activations", [None, DYNAMIC], ids=["weights", "dynamic"])
@pytest.mark.parametrize("spec", [{}, {"symmetric": False}, {"group": 8}, {"group": -1}], ids=str)
def test_torchao_answers_bit_for_bit(tmp_path, model_type, activations, spec):
    ready = made(tmp_path, classifier("no", "perhaps", "yes"), model_type)
    student = quantized(ready[4], ready[1], ready[3], activations, **spec).eval()
    target = shipped(tmp_path, ready, format="torchao")
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    expected = answers(student, ready[3])
    for loaded in (
        plainly(target, ready[1]),
        models.load(str(target), None, ready[1], "student", ready[3], strict=True),
    ):
        assert type(loaded.get_input_embeddings().weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert torch.equal(answers(loaded, ready[3]), expected)
    assert (target / "model.safetensors").stat().st_size < (
        ready[4] / "student" / "model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize("form", ["shapes", "low_rank"])
def test_torchao_holds_students_of_another_form(tmp_path, form):
    ready = made(tmp_path, classifier("no", "yes"), "distilbert")
    reshaped(ready, RESHAPED[form])
    student = quantized(ready[4], ready[1], ready[3], DYNAMIC).eval()
    target = shipped(tmp_path, ready, format="torchao")
    assert torch.equal(answers(plainly(target, ready[1]), ready[3]), answers(student, ready[3]))


@pytest.mark.parametrize(
    ("model_type", "spec", "value"),
    [
        ("distilbert", {"bits": 4}, "4"),
        ("distilbert", {"method": "codebook", "group": -1}, "codebook"),
        ("distilbert", {"activations": {"bits": 8, "range": [-1.0, 1.0]}}, "range|static"),
        ("gpt2", {}, "tied"),
        ("gpt2", {"kinds": tiny_runs.Conv1D}, "GPT-2|Conv1D"),
        (None, {}, "quantized"),
    ],
)
def test_what_torchao_does_not_support_is_refused(tmp_path, model_type, spec, value):
    task = (
        CausalLanguageModelling(max_length=16) if model_type == "gpt2" else classifier("no", "yes")
    )
    ready = made(tmp_path, task, model_type or "bert")
    if model_type:
        quantized(ready[4], task, ready[3], **spec)
    with pytest.raises(UserError, match=f"^.*({value}).*torchao|torchao.*({value})") as error:
        shipped(tmp_path, ready, format="torchao")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("spec", [{"bits": 4}, {"symmetric": False}, {"group": 16}], ids=str)
def test_linear_weights_that_a_runtime_does_not_support_are_refused(tmp_path, format, spec):
    _, _, _, tokenizer, folder = made(tmp_path, classifier("no", "yes"), "distilbert")
    student = models.load(str(folder / "student"), None, classifier("no", "yes"), "student")
    name = next(name for name, _ in student.named_parameters() if name.endswith("lin1.weight"))
    settings = config.Export(format=format)
    with pytest.raises(UserError, match=name):
        packing.check_format(settings, student, tokenizer, {name: QuantSpec(**spec)})
    embedding = "distilbert.embeddings.word_embeddings.weight"
    tensors = {name: QuantSpec(), embedding: QuantSpec(**spec)}
    packing.check_format(settings, student, tokenizer, tensors)


@pytest.mark.parametrize(("quantize", "dynamic"), [(None, True), ("int8", False)])
def test_executorch_multiplies_integers_by_symmetric_rows(tmp_path, quantize, dynamic):
    _, _, _, tokenizer, folder = made(tmp_path, classifier("no", "yes"), "distilbert")
    student = models.load(str(folder / "student"), None, classifier("no", "yes"), "student")
    kinds = ("lin1.weight", "word_embeddings.weight")
    names = sorted(name for name, _ in student.named_parameters() if name.endswith(kinds))
    tensors = dict.fromkeys(names, QuantSpec(group=8))
    settings = config.Export(format="executorch", quantize=quantize)
    with pytest.raises(UserError, match=names[1]):
        packing.check_format(settings, student, tokenizer, tensors, names if dynamic else ())
    settings = config.Export(format="executorch")
    packing.check_format(settings, student, tokenizer, tensors)  # linear layers stay in floats


def test_a_student_that_takes_no_mask_is_refused_before_training(ready):
    tokenizer = ready[3]
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    other = transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes))
    with pytest.raises(UserError, match="FNetForSequenceClassification.*attention_mask.*: "):
        packing.check_format(config.Export(format="onnx"), other, tokenizer, {})


def in_memory(task, raw, tokenizer):
    return Prepared(task, tokenizer, DatasetDict(train=raw, test=raw), DatasetDict())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"format": "packed", "quantize": "weights", "bits": 4}),
        ({"bits": 2}, {"format": "packed", "quantize": "weights", "bits": 2}),
        ({"format": "packed"}, {"format": "packed"}),
        ({"format": "onnx", "quantize": "int8"}, {"format": "onnx", "quantize": "int8"}),
    ],
    ids=str,
)
def test_a_format_named_by_the_command_begins_with_its_defaults(options, expected):
    settings = config.Export(format="packed", quantize="weights", bits=4, examples=7)
    chosen = command.choose_settings(settings, command.Options(**options))
    assert chosen == config.Export(**expected, examples=7)


@pytest.mark.parametrize("format", ["dense", "torchao", "packed"])
def test_a_quantized_student_is_proven_in_each_format(ready, in_process, format):
    quantized(ready[4], ready[1], ready[3], DYNAMIC)
    final, proof = proven(ready, format=format)
    assert (proof["agreement"], proof["max_difference"]) == (1, 0)
    assert proof["bits_per_weight"] == 8 * (final / FILES[format]).stat().st_size / sum(
        map(torch.numel, parameters(ready))
    )
    card = (final / "README.md").read_text()
    assert f"format {format}" in card
    assert ("trust_remote_code=True" in card) == proof["code"] == (format != "torchao")
    assert ("torchao is installed" in card) == (format == "torchao")
    assert {file.name for file in final.glob("*.py")} == (
        {"container.py", "modeling.py"} if proof["code"] else set()
    )


def test_a_packed_language_model_is_proven(tmp_path, in_process):
    ready = made(tmp_path, CausalLanguageModelling(max_length=16), "gpt2")
    quantized(ready[4], ready[1], ready[3], DYNAMIC, bits=4, group=8)
    _, proof = proven(ready, format="packed")
    assert (proof["agreement"], proof["max_difference"]) == (1, 0)


FILES = {"dense": "model.safetensors", "torchao": "model.safetensors", "packed": container.FILE}


def parameters(ready):
    return models.load(str(ready[4] / "student"), None, ready[1], "student", ready[3]).parameters()


@pytest.mark.parametrize("format", ["packed", pytest.param("torchao", marks=pytest.mark.slow)])
def test_each_format_stands_alone(ready, format):
    """With the proof in its own process, which cannot import this library."""
    quantized(ready[4], ready[1], ready[3], DYNAMIC)
    _, proof = proven(ready, format=format, examples=3)
    assert (proof["agreement"], proof["max_difference"]) == (1, 0)
    assert ("torchao" in proof["versions"]) == (format == "torchao")


@pytest.mark.parametrize("format", ["dense", "torchao", "packed"])
def test_cost_is_that_of_the_folder_that_ships(ready, tmp_path, in_process, format):
    quantized(ready[4], ready[1], ready[3], DYNAMIC)
    target = shipped(tmp_path, ready, format=format)
    requests = [
        {name: tensor.tolist() for name, tensor in request.items()}
        for request in inputs(ready[3])[:2]
    ]
    timed = {"student": cost.TimedInputs(requests, requests)}
    costs, _ = cost.measure_costs(
        cost.model_request({"student": target}, ready[1].auto_class, 1, "cpu"), timed
    )
    student, count = costs["student"], sum(map(torch.numel, parameters(ready)))
    assert student.parameters == count
    assert student.bits_per_weight == 8 * (target / FILES[format]).stat().st_size / count
    assert student.disk_bytes == sum(file.stat().st_size for file in target.iterdir())
    # the weights of the other formats are float32 in memory
    assert (student.weight_bytes < 2 * count) == (format == "torchao")


def test_a_container_becomes_dense_by_a_command(ready, tmp_path, monkeypatch, capsys):
    student = quantized(ready[4], ready[1], ready[3], bits=4).eval()
    target = shipped(tmp_path, ready, format="packed")
    monkeypatch.setattr(
        "sys.argv", ["distill.export", f"packed={target}", f"to={tmp_path / 'dense'}"]
    )
    export.main()
    assert f"export: {tmp_path / 'dense'}" in capsys.readouterr().out
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "dense", attn_implementation="eager"
    )
    assert torch.equal(answers(loaded, ready[3]), answers(student, ready[3]))


def test_the_command_line_chooses_the_format(ready, in_process, monkeypatch):
    run, task, raw, tokenizer, folder = ready
    quantized(folder, task, tokenizer, bits=4)
    compose.save_recipe(run, folder / "recipe.yaml")
    monkeypatch.setattr(command, "prepared", lambda *_: in_memory(task, raw, tokenizer))
    monkeypatch.setattr("sys.argv", ["distill.export", f"run={folder}", "format=packed"])
    export.main()
    assert json.loads((folder / "export" / "proof.json").read_text())["format"] == "packed"
    assert not (folder / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("how", "format"),
    [
        ("weights", "torchao"),
        ("dynamic", "torchao"),
        ("dynamic", "packed"),
        ("static", "packed"),
        ("static", "dense"),
    ],
)
def test_a_student_is_quantized_after_training(ready, in_process, monkeypatch, how, format):
    monkeypatch.setattr(ExportSpec, "calibration_inputs", lambda spec: inputs(spec.tokenizer))
    before = (ready[4] / "student" / "model.safetensors").read_bytes()
    final, proof = proven(ready, format=format, quantize=how)
    assert (proof["agreement"], proof["max_difference"]) == (1, 0)
    assert 0 < proof["trained_max_difference"] < 0.2 * proof["max_logit"]
    assert 0.5 < proof["trained_agreement"] <= 1
    assert f"quantized after training ({how})" in (final / "README.md").read_text()
    assert (ready[4] / "student" / "model.safetensors").read_bytes() == before


def inputs(tokenizer):
    return [dict(tokenizer([text], return_tensors="pt")) for text in tiny_runs.TEXTS]


@pytest.mark.parametrize("model_type", ["distilbert", "gpt2"])
def test_static_ranges_are_those_of_the_calibration(tmp_path, model_type):
    task = (
        CausalLanguageModelling(max_length=16) if model_type == "gpt2" else classifier("no", "yes")
    )
    ready = made(tmp_path, task, model_type)
    student = models.load(str(ready[4] / "student"), None, task, "student", ready[3])
    seen = {}
    name, layer = next(
        (name, layer)
        for name, layer in student.named_modules()
        if isinstance(layer, modeling.LINEAR)
    )
    layer.register_forward_pre_hook(
        lambda module, args: seen.update({len(seen): args[0].aminmax()})
    )
    examples = inputs(ready[3])
    ranges = post_training.observe_ranges(student, {name: layer}, examples)
    assert ranges == {
        name: [
            min(float(low) for low, _ in seen.values()),
            max(float(high) for _, high in seen.values()),
        ]
    }
    assert len(seen) == len(examples)


def test_calibration_reads_training_examples_one_at_a_time():
    made = worlds.world()
    run, train = made.run, made.raw["train"]
    spec = ExportSpec(run.export, run.data, made.task, made.tokenizer, train)
    batches = list(spec.calibration_inputs())
    assert len(batches) == min(export_spec.CALIBRATION, len(train))
    assert {len(inputs["input_ids"]) for inputs in batches} == {1}
    assert all(inputs["attention_mask"].all() for inputs in batches)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("distilbert", {"classifier.weight"}),
        ("bert", {"classifier.weight", "bert.embeddings.token_type_embeddings.weight"}),
        ("gpt2", set()),
    ],
)
def test_every_matrix_but_the_smallest_is_quantized_after_training(
    tmp_path, model_type, left, bits
):
    task = (
        CausalLanguageModelling(max_length=16) if model_type == "gpt2" else classifier("no", "yes")
    )
    ready = made(tmp_path, task, model_type)
    student = models.load(str(ready[4] / "student"), None, task, "student", ready[3])
    post_training.quantize_model(student, "weights", bits, ())
    matrices = {name for name, tensor in student.named_parameters() if tensor.ndim == 2}
    assert set(student.config.compression["weights"]) == matrices - left
    compression = CompressionConfig.from_config(student.config)
    # raises for a weight that is not a quantized value
    packed.pack(student.state_dict(), compression, packed.transposed(student), torch.float32)
