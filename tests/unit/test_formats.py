"""Exports in torchao's format, what that cannot hold, and quantization after training."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import distill
from distill import export, isolated, models, packing
from distill.compress.quantizer import QuantSpec
from distill.errors import UserError
from distill.evaluate import cost
from distill.packing import packed, post_training
from distill.recipe import capabilities, compose, config
from distill.remote_code import container
from distill.tasks import CausalLanguageModelling
from tests import worlds
from tests.unit import tiny_runs
from tests.unit.test_packing import RESHAPED, answers, plainly, reshaped, shipped
from tests.unit.tiny_runs import classifier, made, quantized

DYNAMIC = {"bits": 8, "range": None}


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.ask_here)


@pytest.fixture
def ready(tmp_path):
    return made(tmp_path, classifier("no", "perhaps", "yes"), "distilbert")


def proven(ready, **settings):
    run, *rest = ready
    run.export = config.Export(**settings)
    final = export.export(run, *rest)
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
    ("model_type", "spec", "said"),
    [
        ("distilbert", {"bits": 4}, r"torchao stores a 4-bit value in a whole byte \("),
        (
            "distilbert",
            {"method": "codebook", "group": -1},
            "is quantized with codebook, and torchao knows linear codes only",
        ),
        (
            "distilbert",
            {"activations": {"bits": 8, "range": [-1.0, 1.0]}},
            "are rounded to a fixed range",
        ),
        ("gpt2", {}, "is a tied tensor"),
        ("gpt2", {"kinds": tiny_runs.Conv1D}, "belongs to a layer of GPT-2's"),
        (None, {}, "no weight of the student is quantized"),
    ],
)
def test_what_torchao_cannot_hold_is_refused_in_a_sentence(tmp_path, model_type, spec, said):
    task = (
        CausalLanguageModelling(max_length=16) if model_type == "gpt2" else classifier("no", "yes")
    )
    ready = made(tmp_path, task, model_type or "bert")
    if model_type:
        quantized(ready[4], task, ready[3], **spec)
    with pytest.raises(UserError, match=f"^export.format is torchao, but .*{said}.*: .*") as error:
        shipped(tmp_path, ready, format="torchao")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"bits": 4}, "4 bits"),
        ({"symmetric": False}, "an affine grid"),
        ({"group": 16}, "for each group"),
    ],
    ids=str,
)
def test_grids_that_a_runtime_cannot_multiply_by_are_refused_before_training(
    tmp_path, format, spec, said
):
    run, _, _, tokenizer, folder = made(tmp_path, classifier("no", "yes"), "distilbert")
    student = models.load(str(folder / "student"), None, classifier("no", "yes"), "student")
    name = next(name for name, _ in student.named_parameters() if name.endswith("lin1.weight"))
    run = replace(run, export=config.Export(format=format))
    with pytest.raises(
        UserError, match=f"^export.format is {format}, but {name} has .*{said}.*: set"
    ):
        packing.check_format(run, student, tokenizer, {name: QuantSpec(**spec)})
    packing.check_format(
        run,
        student,
        tokenizer,
        {name: QuantSpec(), "distilbert.embeddings.word_embeddings.weight": QuantSpec(**spec)},
    )


@pytest.mark.parametrize(("quantize", "rounded"), [(None, True), ("int8", False)])
def test_executorch_multiplies_integers_by_symmetric_rows(tmp_path, quantize, rounded):
    run, _, _, tokenizer, folder = made(tmp_path, classifier("no", "yes"), "distilbert")
    student = models.load(str(folder / "student"), None, classifier("no", "yes"), "student")
    names = [
        name
        for name, _ in student.named_parameters()
        if name.endswith(("lin1.weight", "word_embeddings.weight"))
    ]
    tensors = dict.fromkeys(sorted(names), QuantSpec(group=8))
    run = replace(run, export=config.Export(format="executorch", quantize=quantize))
    with pytest.raises(
        UserError,
        match=f"^export.format is executorch, but {names[1]} is quantized with .*symmetric rows only: choose",
    ):
        packing.check_format(run, student, tokenizer, tensors, names if rounded else ())
    packing.check_format(
        replace(run, export=config.Export(format="executorch")), student, tokenizer, tensors
    )  # all stays in floats


def test_a_student_that_takes_no_mask_is_refused_before_training(ready):
    run, _, _, tokenizer, _ = ready
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    other = transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes))
    with pytest.raises(
        UserError,
        match="^export.format is onnx, but a FNetForSequenceClassification takes no attention_mask.*: set",
    ):
        packing.check_format(
            replace(run, export=config.Export(format="onnx")), other, tokenizer, {}
        )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [([], ("packed", 4)), (["format=packed"], ("packed", 8)), (["bits=2"], ("packed", 2))],
)
def test_another_format_is_not_given_what_the_recipe_s_was(ready, monkeypatch, asked, expected):
    run, task, raw, tokenizer, folder = ready
    compose.save_recipe(
        replace(run, export=config.Export(format="packed", quantize="weights", bits=4)),
        folder / "recipe.yaml",
    )
    monkeypatch.setattr(export, "prepared", lambda *_: (task, raw, tokenizer))
    monkeypatch.setattr(export, "export", lambda run, *_: found.append(run.export))
    monkeypatch.setattr("sys.argv", ["distill.export", f"run={folder}", *asked])
    found = []
    export.main()
    assert (found[0].format, found[0].bits) == expected and (found[0].quantize is None) == (
        "format=packed" in asked
    )


def test_an_architecture_of_unknown_layers_is_not_quantized_after_training(tmp_path):
    run, _, _, tokenizer, _ = made(tmp_path, classifier("no", "yes"), "distilbert")
    other = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, vocab_size=9
        )
    )
    with pytest.raises(
        UserError,
        match="^export.quantize is weights, but the architecture is opt.*: leave export.quantize out$",
    ):
        packing.check_format(
            replace(run, export=config.Export(format="onnx", quantize="weights")),
            other,
            tokenizer,
            {},
        )


def quantizer(**arguments):
    return {"q": {"_target_": "distill.callbacks.Quantize", **arguments}}


@pytest.mark.parametrize(
    ("callbacks", "settings", "said"),
    [
        ({}, ("torchao", "float32", None, 8), "export.format is torchao, but nothing is quantized"),
        (
            quantizer(bits=4),
            ("torchao", "float32", None, 8),
            "callbacks.q.bits is 4, and torchao stores a 4-bit value in a whole byte",
        ),
        (
            quantizer(bits=8, method="codebook"),
            ("torchao", "float32", None, 8),
            "quantized with codebook",
        ),
        (
            quantizer(bits=8, activations="static"),
            ("torchao", "float32", None, 8),
            "callbacks.q.activations is static",
        ),
        ({}, ("torchao", "float32", "static", 8), "export.quantize is static"),
        ({}, ("torchao", "float32", "weights", 5), "export.bits is 5"),
        (
            quantizer(bits=8),
            ("packed", "float32", "weights", 8),
            "callbacks.q quantizes in training",
        ),
        (
            quantizer(bits=8),
            ("torchao", "bfloat16", None, 8),
            "export.dtype is bfloat16, in which its tensors do not compute",
        ),
        (
            {},
            ("packed", "float32", None, 4),
            "export.bits is 4, but nothing is quantized after training",
        ),
    ],
)
def test_a_recipe_that_its_format_cannot_hold_is_refused(callbacks, settings, said):
    with pytest.raises(UserError, match=said):
        capabilities.check(callbacks, *settings)


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    with pytest.raises(UserError, match="the package torchao is not installed: pip install"):
        capabilities.check(quantizer(bits=8), "torchao", "float32", None, 8)


@pytest.mark.parametrize("format", capabilities.RUNTIMES)
def test_a_missing_or_old_runtime_is_said_before_training(monkeypatch, format):
    runtime = capabilities.RUNTIMES[format]
    has = dict.fromkeys(runtime.needs, "9999.1")
    monkeypatch.setattr(capabilities, "installed_version", lambda package: has.get(package))
    capabilities.check({}, format, "float32", "int8", 8)
    has[runtime.name] = "0.1"
    way_out = f"pip install --upgrade 'distill.{format}.'"
    old = f"^export.format is {format}, but {runtime.name} is 0.1, and .* is the oldest that can be used: {way_out}$"
    with pytest.raises(UserError, match=old):
        capabilities.check({}, format, "float32", None, 8)
    del has[runtime.name]
    missing = f"^export.format is {format}, but {runtime.name} is not installed: pip install 'distill.{format}.'$"
    with pytest.raises(UserError, match=missing):
        capabilities.check({}, format, "float32", None, 8)


def test_an_extra_asks_for_what_its_format_needs():
    extras = tomllib.loads((Path(distill.__file__).parents[1] / "pyproject.toml").read_text())[
        "project"
    ]["optional-dependencies"]
    for format, runtime in capabilities.RUNTIMES.items():
        least = {
            requirement.partition(">=")[0]: requirement.partition(">=")[2].partition(",")[0]
            for requirement in extras[format]
        }
        assert least == runtime.needs


@pytest.mark.parametrize(
    ("callbacks", "settings", "said"),
    [
        (
            {},
            ("onnx", "bfloat16", None, 8),
            "export.dtype is bfloat16, and onnxruntime is given float32 only",
        ),
        (
            {},
            ("openvino", "float16", None, 8),
            "export.dtype is float16, and openvino is given float32 or bfloat16 only",
        ),
        (
            {},
            ("openvino", "float32", "dynamic", 8),
            "export.quantize is dynamic, which openvino runs no faster: choose one of int8, static",
        ),
        (
            {},
            ("onnx", "float32", "static", 4),
            "export.bits is 4, and onnxruntime computes with 8: set export.format=packed",
        ),
        (
            quantizer(bits=3, method="codebook"),
            ("onnx", "float32", None, 8),
            "callbacks.q quantizes with codebook, which onnxruntime",
        ),
        (
            quantizer(bits=4),
            ("onnx", "float32", None, 8),
            "callbacks.q.bits is 4, and onnxruntime multiplies by 8: set export.format=packed",
        ),
        (
            quantizer(symmetric=False),
            ("onnx", "float32", None, 8),
            "callbacks.q.symmetric is False, and onnxruntime multiplies by codes",
        ),
        (
            quantizer(group=64),
            ("openvino", "float32", "int8", 8),
            "callbacks.q.group is 64, and openvino multiplies by rows",
        ),
        (
            quantizer(symmetric=False, activations="dynamic"),
            ("executorch", "float32", None, 8),
            "callbacks.q.symmetric is False, and executorch",
        ),
        (
            quantizer(activations="static"),
            ("executorch", "float32", "int8", 8),
            "callbacks.q.activations is static and export.quantize is int8, and executorch rounds .*: leave export.quantize out",
        ),
        (
            {},
            ("packed", "float32", "int8", 8),
            "export.quantize is int8, but that is for onnx, openvino, executorch",
        ),
    ],
)
def test_a_recipe_that_a_runtime_cannot_compute_is_refused(monkeypatch, callbacks, settings, said):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: "9999.1")
    with pytest.raises(UserError, match=said):
        capabilities.check(callbacks, *settings)


def test_a_runtime_takes_a_student_that_was_quantized_in_training(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: "9999.1")
    capabilities.check(quantizer(bits=8, activations="static"), "onnx", "float32", "static", 8)
    capabilities.check(quantizer(bits=4, layers=["*word_embeddings"]), "onnx", "float32", None, 8)
    capabilities.check(
        quantizer(symmetric=False, layers=["*word_embeddings"]), "onnx", "float32", None, 8
    )
    capabilities.check(
        quantizer(symmetric=False, group=64, activations="static"), "executorch", "float32", None, 8
    )  # floats, then
    assert [capabilities.resolve_quantize(format, "int8") for format in capabilities.RUNTIMES] == [
        "dynamic",
        "static",
        "dynamic",
    ]


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        (quantizer(bits=8, activations="dynamic"), ("torchao", "float32", None, 8)),
        (quantizer(bits=3, method="codebook"), ("packed", "float32", None, 8)),
        ({}, ("torchao", "float32", "dynamic", 8)),
        ({}, ("dense", "float32", None, 8)),
        ({}, (None, "float32", None, 8)),
    ],
)
def test_a_recipe_that_its_format_can_hold_is_not(callbacks, settings):
    capabilities.check(callbacks, *settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "gguf"), ("quantize", "half"), ("bits", 1), ("bits", 9), ("dtype", "int8")],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"^export.{key} is {value}, but"):
        config.Export(**{key: value})


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


@pytest.mark.parametrize("format", ["dense", "torchao", "packed"])
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
        {name: tensor.tolist() for name, tensor in given.items()} for given in inputs(ready[3])[:2]
    ]
    costs, _ = cost.measure({"student": target}, ready[1].auto_class, requests, requests, 1, "cpu")
    found, count = costs["student"], sum(map(torch.numel, parameters(ready)))
    assert found["parameters"] == count
    assert found["bits_per_weight"] == 8 * (target / FILES[format]).stat().st_size / count
    assert found["disk_bytes"] == sum(file.stat().st_size for file in target.iterdir())
    assert (found["weight_bytes"] < 2 * count) == (
        format == "torchao"
    )  # the others answer from float32


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
    monkeypatch.setattr(export, "prepared", lambda run, folder: (task, raw, tokenizer))
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
    monkeypatch.setattr(packing, "calibration", lambda run, task, tokenizer: inputs(tokenizer))
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
        if isinstance(layer, post_training.LINEAR)
    )
    layer.register_forward_pre_hook(
        lambda module, given: seen.update({len(seen): given[0].aminmax()})
    )
    examples = inputs(ready[3])
    found = post_training.observe_ranges(student, {name: layer}, examples)
    assert found == {
        name: [
            min(float(low) for low, _ in seen.values()),
            max(float(high) for _, high in seen.values()),
        ]
    }
    assert len(seen) == len(examples)


def test_calibration_reads_training_examples_one_at_a_time():
    made = worlds.world()
    found = list(post_training.calibration_inputs(made.run, made.task, made.tokenizer))
    assert len(found) == min(post_training.CALIBRATION, len(made.raw["train"]))
    assert {len(given["input_ids"]) for given in found} == {1}
    assert all(given["attention_mask"].all() for given in found)


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
    packed.pack(
        student.state_dict(), student.config.compression, packed.transposed(student), torch.float32
    )  # refuses what is on no grid
