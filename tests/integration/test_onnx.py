"""ONNX and OpenVINO exports: equal logits in the runtime alone, int8 products, no local paths."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import DatasetDict

from distill import export, models, packing
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.data import columns_to_examples
from distill.errors import RunFailed, UserError
from distill.export import command, verify_program
from distill.isolated.scripts.runtime_models import load_program
from distill.packing import ExportSpec, quant_layers, runtime_folder
from distill.prepare import Prepared
from distill.recipe import compose, config
from distill.remote_code.modeling import LINEAR
from distill.tasks import CausalLanguageModelling, MultiLabelClassification, Regression
from tests.unit import tiny_runs
from tests.unit.test_packing import RESHAPED, reshaped
from tests.unit.tiny_runs import classifier, exported, made, quantized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

STATIC = {"bits": 8, "range": [-4.0, 3.0]}


@pytest.fixture(autouse=True)
def _calibrated(monkeypatch):
    """On the texts themselves: these runs have no data to load."""

    def calibration(spec):
        return [
            dict(spec.tokenizer([text], return_tensors="pt", return_token_type_ids=False))
            for text in tiny_runs.TEXTS
        ]

    monkeypatch.setattr(ExportSpec, "calibration_inputs", calibration)


@pytest.fixture
def ready(tmp_path):
    return made(tmp_path, classifier("no", "perhaps", "yes"), "distilbert", teacher_layers=40)


def proven(ready, **settings):
    run, *rest = ready
    run.export = config.Export(**{"format": "onnx"} | settings)
    final = exported(replace(run, evaluate=config.Evaluate(batch_size=5, bootstrap=20)), *rest)
    return final, json.loads((final / "proof.json").read_text())


def graph_of(final):
    return onnx.load(final / "model.onnx").graph


def tensors(graph):
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


def slow(*row):
    """A row that is not tried by default: each writes a graph."""
    return pytest.param(*row, marks=pytest.mark.slow)


LANGUAGE = CausalLanguageModelling(max_length=16)


@pytest.mark.parametrize(
    ("task", "model_type", "columns"),
    [
        (classifier("no", "perhaps", "yes"), "bert", ("text",)),
        (classifier("no", "yes"), "bert", ("premise", "hypothesis")),
        slow(classifier("no", "yes"), "roberta", ("premise", "hypothesis")),
        slow(classifier("no", "yes"), "gpt2", ("text",)),
        slow(classifier("a", "b", "c", kind=MultiLabelClassification), "distilbert", ("text",)),
        slow(classifier(kind=Regression), "distilbert", ("text",)),
        (LANGUAGE, "gpt2", ("text",)),
    ],
    ids=["bert", "pairs", "roberta", "gpt2", "several labels", "number", "language"],
)
def test_float32_is_the_student_at_any_shape(tmp_path, task, model_type, columns):
    """Batches of five and of what is left, texts of every length, each also alone."""
    ready = made(tmp_path, task, model_type, teacher_layers=9, columns=columns)
    final, proof = proven(ready)
    assert (proof["agreement"], proof["texts"], proof["batch"]) == (1, len(tiny_runs.TEXTS), 5)
    assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])
    assert (proof["quality"] is None) == (task is LANGUAGE)
    assert (final / "README.md").read_text().count(
        runtime_folder.runtime_program("onnx", task)
    ) == 1
    content = (final / "model.onnx").read_bytes()
    assert os.path.dirname(torch.__file__).encode() not in content
    assert b"distill/" not in content


@pytest.mark.parametrize("form", ["shapes", "low_rank"])
def test_students_of_another_form_are_held(ready, form):
    reshaped(ready, RESHAPED[form])
    proof = proven(ready)[1]
    assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])


@pytest.mark.parametrize("how", ["dynamic", "static", slow("weights")])
def test_int8_keeps_the_predictions_and_stores_no_matrix_in_float(ready, how):
    final, proof = proven(ready, quantize=how)
    assert proof["agreement"] >= verify_program.AGREEMENT_INT8
    assert proof["agreement_interval"][0] < proof["agreement"] <= proof["agreement_interval"][1]
    assert 1e-6 < proof["max_difference"] < 0.2 * proof["max_logit"]
    graph = graph_of(final)
    kept = {
        name
        for name, tensor in tensors(graph).items()
        if tensor.ndim == 2 and tensor.dtype == "float32"
    }
    assert kept == {"model.classifier.weight"}
    operators = {node.op_type for node in graph.node}
    assert ("MatMulInteger" in operators) == (how == "dynamic")
    assert ("QuantizeLinear" in operators) == (how == "static")


def test_a_gpt2_stores_its_tied_table_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        verify_program, "AGREEMENT_INT8", 0.5
    )  # the next tokens of a random model are close calls
    ready = made(tmp_path, LANGUAGE, "gpt2", teacher_layers=9)
    plain, small = proven(ready), proven(ready, quantize="int8")
    assert small[1]["bits_per_weight"] < plain[1]["bits_per_weight"]
    table = (
        models.load(str(tmp_path / "student"), None, LANGUAGE, "student", ready[3])
        .get_input_embeddings()
        .weight
    )
    assert sum(tensor.size == table.numel() for tensor in tensors(graph_of(small[0])).values()) == 1


@pytest.mark.parametrize("activations", [None, STATIC], ids=["weights", "static"])
@pytest.mark.parametrize("group", [0, -1], ids=["rows", "tensor"])
def test_a_trained_student_keeps_its_weights_and_ranges(ready, activations, group):
    student = quantized(ready[4], ready[1], ready[3], activations, group=group).eval()
    final, proof = proven(ready)
    # Another order of sums can move a quantized input to the next of its 256 values.
    near = 1e-5 * max(1, proof["max_logit"]) if activations is None else 0.1 * proof["max_logit"]
    assert proof["max_difference"] <= near
    stored = tensors(graph_of(final))
    for name, described in student.config.compression["weights"].items():
        qweight_OI, _ = quantize_weight(student.get_parameter(name), QuantSpec(**described))
        owner = f"model.{name.removesuffix('.weight')}"
        qweight = torch.from_numpy(stored[f"{owner}.qweight"].copy())
        expected = (qweight_OI.short() - 127).to(torch.int8)
        assert qweight.dtype == torch.int8
        assert torch.equal(qweight, expected if "embeddings" in name else expected.T)
    if activations is None:
        assert "QuantizeLinear" not in {node.op_type for node in graph_of(final).node}
        return
    low, high = STATIC["range"]
    scales = [tensor for name, tensor in stored.items() if name.endswith("input_scale")]
    assert scales
    assert all(abs(scale - (high - low) / 255) < 1e-9 for scale in scales)


@pytest.mark.parametrize(
    "spec",
    [
        {"bits": 4, "symmetric": False, "group": 8},
        slow({"bits": 3, "group": 0}),
        slow({"bits": 6, "group": -1}),
    ],
    ids=str,
)
def test_an_embedding_of_few_bits_is_looked_up_exactly(ready, spec):
    quantized(ready[4], ready[1], ready[3], kinds=torch.nn.Embedding, **spec)
    proof = proven(ready)[1]
    assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ({"bits": 4}, "bits of .* is 4"),
        ({"symmetric": False}, "symmetric of .* is false"),
        ({"group": 8}, "group of .* is 8"),
        ({"bits": 3, "method": "codebook", "group": -1}, "method of .* is codebook"),
    ],
    ids=str,
)
def test_weights_that_integers_cannot_multiply_are_refused(ready, spec, value):
    quantized(ready[4], ready[1], ready[3], **spec)
    with pytest.raises(UserError, match=f"^{value}, but .*onnx.*: set export.format="):
        proven(ready)
    assert sorted(path.name for path in ready[4].iterdir()) == ["student", "teacher"]


def producers(graph):
    return {output: node for node in graph.node for output in node.output}


def test_static_follows_the_rules_of_explicit_quantization(ready):
    """TensorRT's rules: symmetric int8, scales per output of a weight and per input tensor, QDQ
    pairs.
    """
    graph = graph_of(proven(ready, quantize="static")[0])
    stored, made_by = tensors(graph), producers(graph)
    student = models.load(str(ready[4] / "student"), None, ready[1], "student", ready[3])
    expected = (
        sum(isinstance(layer, LINEAR) for layer in student.modules()) - 1
    )  # all but the classifier
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    pairs = [[made_by.get(each) for each in node.input[:2]] for node in products]
    whole = [
        pair
        for pair in pairs
        if all(side is not None and side.op_type == "DequantizeLinear" for side in pair)
    ]
    assert len(whole) == expected
    for input_side, weight_side in whole:
        rounding = made_by[input_side.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert rounding.input[1:] == input_side.input[1:]
        assert stored[input_side.input[1]].size == 1
        weight, scale, zero = (stored[each] for each in weight_side.input)
        assert weight.dtype == zero.dtype == stored[input_side.input[2]].dtype == "int8"
        assert not zero.any() and not stored[input_side.input[2]].any()
        assert scale.shape == (
            weight.shape[next(a.i for a in weight_side.attribute if a.name == "axis")],
        )
        assert abs(weight.astype(int)).max() <= 127
    others = [
        pair for pair in pairs if pair not in whole
    ]  # the two of attention, and the classifier
    assert not any(
        side is not None and side.op_type == "DequantizeLinear" for pair in others for side in pair
    )


def test_a_static_answer_does_not_depend_on_the_batch(ready, monkeypatch):
    final, _ = proven(ready, quantize="static")
    monkeypatch.chdir(final)
    answer = load_program(final, runtime_folder.runtime_program("onnx", ready[1]))["predict"]
    batch = answer(tiny_runs.TEXTS)
    assert (
        max(
            abs(answer([text]) - row).max()
            for text, row in zip(tiny_runs.TEXTS, batch, strict=True)
        )
        < 1e-5
    )


def test_the_program_prints_a_label_for_a_text(ready):
    final, _ = proven(ready)
    (final / "program.py").write_text(runtime_folder.runtime_program("onnx", ready[1]))
    done = subprocess.run(
        [sys.executable, "program.py", "a cat sees"],
        cwd=final,
        capture_output=True,
        text=True,
        check=True,
    )
    text, label, logit = done.stdout.strip().split(" | ")
    assert (text, label in ("no", "perhaps", "yes")) == ("a cat sees", True)
    float(logit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda draft: (draft / "model.onnx").write_bytes(b"damaged"),
            "not loadable: onnxruntime cannot use it",
        ),
        (lambda draft: (draft / "tokenizer.json").unlink(), "not loadable"),
        (lambda draft: nudge(draft), "not equal: .* logits differ by up to"),
    ],
    ids=["damaged", "no tokenizer", "other weights"],
)
def test_a_tampered_export_is_refused_and_leaves_nothing(ready, monkeypatch, change, message):
    write = packing.write_format

    def changed(spec, student, draft):
        write(spec, student, draft)
        change(draft)

    monkeypatch.setattr(packing, "write_format", changed)
    with pytest.raises(RunFailed, match=message):
        proven(ready)
    assert sorted(path.name for path in ready[4].iterdir()) == ["student", "teacher"]


def nudge(draft):
    model = onnx.load(draft / "model.onnx")
    head = next(each for each in model.graph.initializer if each.name == "model.classifier.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * 1.01, head.name))
    onnx.save(model, draft / "model.onnx")


@pytest.mark.parametrize(
    ("format", "quantize", "message"),
    [
        (
            "onnx",
            "int8",
            "^try export.quantize=static or weights, leave it out, or train with "
            "distill.callbacks.Quantize$",
        ),
        (
            "executorch",
            "int8",
            "^leave export.quantize out, or train with distill.callbacks.Quantize$",
        ),
        ("onnx", None, "^set export.format=packed or dense$"),
    ],
)
def test_the_way_out_is_one_that_there_is(ready, format, quantize, message):
    ready[0].export = config.Export(format=format, quantize=quantize)
    needed, tolerance, way_out = verify_program.choose_tolerance(ready[0].export, 1.0, True)
    assert (needed, tolerance) == (verify_program.AGREEMENT_INT8, None) and re.match(
        message, way_out
    )


def test_what_rounds_less_must_agree_more(ready):
    def needed(rounds, **settings):
        ready[0].export = config.Export(format="openvino", **settings)
        return verify_program.choose_tolerance(ready[0].export, 1.0, rounds).agreement

    assert (
        needed(False)
        == 1
        > needed(False, dtype="bfloat16")
        == verify_program.AGREEMENT
        > needed(True)
        == verify_program.AGREEMENT_INT8
    )
    assert {needed(rounds, dtype="bfloat16", quantize="int8") for rounds in (False, True)} == {
        verify_program.AGREEMENT_INT8
    }


def test_a_program_that_needs_torch_is_refused(ready, monkeypatch):
    text = runtime_folder.runtime_program("onnx", ready[1])
    monkeypatch.setattr(runtime_folder, "runtime_program", lambda *of: f"import torch\n{text}")
    with pytest.raises(RunFailed, match="torch is blocked: an export must work without it"):
        proven(ready)


def test_a_graph_that_torch_cannot_write_is_one_sentence(ready, monkeypatch):
    def failing(*arguments, **options):
        raise torch.onnx.OnnxExporterError("no such operator\nand more") from ValueError(
            "aten.odd is not known\nat line 1"
        )

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(
        UserError,
        match="cannot write as a graph .aten.odd is not known at line 1.: set export.format=dense",
    ):
        proven(ready)


@pytest.mark.parametrize(
    ("task", "pairs"),
    [(classifier("a", "b"), False), (classifier("a", "b"), True), (LANGUAGE, False)],
)
def test_the_tokenizer_gives_what_training_gave(tmp_path, task, pairs):
    """Texts that fit and texts that do not; of these a language model reads the end."""
    columns = ("premise", "hypothesis") if pairs else ("text",)
    run, task, raw, tokenizer, _ = made(
        tmp_path, task, "gpt2" if task is LANGUAGE else "bert", columns=columns
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    long = {name: [*raw[name], " ".join(raw[name]), ""] for name in columns}
    texts = type(raw).from_dict(long)
    rows = task.runtime_tokenizer(tokenizer).encode_batch(
        [row[0] if not pairs else row for row in zip(*long.values(), strict=True)]
    )
    columns = task.encode_requests(texts[:], tokenizer, run.data, keep_end=True)
    batch = task.collate(columns_to_examples(columns), tokenizer.pad_token_id)
    assert [row.ids for row in rows] == batch.inputs["input_ids"].tolist()
    assert [row.attention_mask for row in rows] == batch.inputs["attention_mask"].tolist()
    if "token_type_ids" in batch.inputs:
        assert [row.type_ids for row in rows] == batch.inputs["token_type_ids"].tolist()


def test_a_tokenizer_of_transformers_alone_is_refused(ready):
    class Slow:
        is_fast = False

    with pytest.raises(
        UserError,
        match="export.format is onnx, but the tokenizer is Slow, which only transformers can run",
    ):
        runtime_folder.check(
            "onnx", models.load(str(ready[4] / "student"), None, ready[1], "student"), Slow()
        )


def test_a_calibrated_range_is_symmetric_and_a_trained_one_is_kept():
    calibrated = quant_layers.symmetric_range(-1.0, 2.54)
    assert calibrated.scale == pytest.approx(0.02)
    assert (calibrated.mode, calibrated.zero_point, calibrated.dtype) == ("static", 0, "int8")
    trained = quant_layers.trained_range(-1.0, 2.0)
    assert trained.scale == pytest.approx(3 / 255)
    assert (trained.zero_point, trained.dtype) == (85, "uint8")


def test_the_command_line_exports_int8(ready, monkeypatch, capsys):
    run, task, raw, tokenizer, folder = ready
    compose.save_recipe(run, folder / "recipe.yaml")
    prepared = Prepared(task, tokenizer, DatasetDict(train=raw, test=raw), DatasetDict())
    monkeypatch.setattr(command, "prepared", lambda *_: prepared)
    monkeypatch.setattr(
        sys, "argv", ["distill.export", f"run={folder}", "format=onnx", "quantize=int8"]
    )
    export.main()
    assert f"export: {folder / 'export'}" in capsys.readouterr().out
    assert json.loads((folder / "export" / "proof.json").read_text())["quantize"] == "dynamic"


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 33),
        ({"quantize": "static"}, 20),
        slow({"quantize": "weights"}, 20),
        slow({"dtype": "bfloat16"}, 20),
    ],
    ids=str,
)
def test_openvino_answers_too(ready, settings, bits):
    pytest.importorskip("openvino")
    final, proof = proven(ready, format="openvino", **settings)
    assert proof["agreement"] >= verify_program.AGREEMENT_INT8
    assert (
        8 * (final / "openvino_model.bin").stat().st_size / sum(map(torch.numel, parameters(ready)))
        < bits
    )
    if not settings:
        assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])
    assert "openvino" in (final / "README.md").read_text()


def parameters(ready):
    return models.load(str(ready[4] / "student"), None, ready[1], "student", ready[3]).parameters()


def test_openvino_keeps_trained_weights_and_ranges(ready):
    pytest.importorskip("openvino")
    quantized(ready[4], ready[1], ready[3], STATIC)
    proof = proven(ready, format="openvino")[1]
    # Another order of sums can move a quantized input to the next of its 256 values.
    assert proof["max_difference"] <= 0.2 * proof["max_logit"]
