"""Students as ONNX and OpenVINO have them: the same answers by the runtime alone, real int8, nothing of this machine."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from distill import export, models, packing
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.errors import RunFailed, UserError
from distill.export import program, runtime_proof
from distill.packing import quant_layers
from distill.packing import runtime_folder as served_files
from distill.recipe import compose, config
from distill.remote_code.modeling import LINEAR
from distill.tasks import CausalLanguageModelling, MultiLabelClassification, Regression
from tests.unit import tiny_runs
from tests.unit.test_packing import RESHAPED, reshaped
from tests.unit.tiny_runs import classifier, made, quantized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

STATIC = {"bits": 8, "range": [-4.0, 3.0]}


@pytest.fixture(autouse=True)
def _calibrated(monkeypatch):
    """On the texts themselves: these runs have no data to load."""

    def calibration(run, task, tokenizer):
        return [
            dict(tokenizer([text], return_tensors="pt", return_token_type_ids=False))
            for text in tiny_runs.TEXTS
        ]

    monkeypatch.setattr(served_files, "calibration", calibration)


@pytest.fixture
def ready(tmp_path):
    return made(tmp_path, classifier("no", "perhaps", "yes"), "distilbert", teacher_layers=40)


def proven(ready, **settings):
    run, *rest = ready
    run.export = config.Export(**{"format": "onnx"} | settings)
    final = export.export(replace(run, evaluate=config.Evaluate(batch_size=5, bootstrap=20)), *rest)
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
        served_files.runtime_program("onnx", task.pipeline)
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
    assert proof["agreement"] >= runtime_proof.AGREEMENT_INT8
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
        runtime_proof, "AGREEMENT_INT8", 0.5
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
def test_a_trained_student_keeps_its_codes_and_ranges(ready, activations, group):
    student = quantized(ready[4], ready[1], ready[3], activations, group=group).eval()
    final, proof = proven(ready)
    assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])
    stored = tensors(graph_of(final))
    for name, described in student.config.compression["weights"].items():
        codes_OI, _ = quantize_weight(student.get_parameter(name), QuantSpec(**described))
        owner = f"model.{name.removesuffix('.weight')}"
        found = torch.from_numpy(stored[f"{owner}.codes"].copy())
        expected = (codes_OI.short() - 127).to(torch.int8)
        assert found.dtype == torch.int8
        assert torch.equal(found, expected if "embeddings" in name else expected.T)
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
    ("spec", "said"),
    [
        ({"bits": 4}, "has 4 bits, a symmetric grid, and integer arithmetic takes 8 bits"),
        ({"symmetric": False}, "has 8 bits, an affine grid"),
        ({"group": 8}, "has 8 bits, a symmetric grid for each group"),
        (
            {"bits": 3, "method": "codebook", "group": -1},
            "is quantized with codebook, which it cannot look up",
        ),
    ],
)
def test_what_integers_cannot_compute_is_refused_in_a_sentence(ready, spec, said):
    quantized(ready[4], ready[1], ready[3], **spec)
    with pytest.raises(
        UserError,
        match=f"^export.format is onnx, but .*{said}.*: set export.format=packed or dense$",
    ):
        proven(ready)
    assert sorted(path.name for path in ready[4].iterdir()) == ["student", "teacher"]


def producers(graph):
    return {output: node for node in graph.node for output in node.output}


def test_static_follows_the_rules_of_explicit_quantization(ready):
    """TensorRT's: symmetric int8, a scale for each output of a weight and one for its input, pairs right before the product."""
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
    answer = program.load(
        {"folder": final, "program": served_files.runtime_program("onnx", ready[1].pipeline)}
    )["answer"]
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
    (final / "program.py").write_text(served_files.runtime_program("onnx", ready[1].pipeline))
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
    ("change", "said"),
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
def test_a_tampered_export_is_refused_and_leaves_nothing(ready, monkeypatch, change, said):
    write = packing.write_format

    def changed(run, task, tokenizer, student, draft):
        write(run, task, tokenizer, student, draft)
        change(draft)

    monkeypatch.setattr(packing, "write_format", changed)
    with pytest.raises(RunFailed, match=said):
        proven(ready)
    assert sorted(path.name for path in ready[4].iterdir()) == ["student", "teacher"]


def nudge(draft):
    model = onnx.load(draft / "model.onnx")
    head = next(each for each in model.graph.initializer if each.name == "model.classifier.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * 1.01, head.name))
    onnx.save(model, draft / "model.onnx")


@pytest.mark.parametrize(
    ("format", "quantize", "said"),
    [
        (
            "onnx",
            "int8",
            "^try export.quantize=static or weights, leave it out, or train with distill.callbacks.Quantize$",
        ),
        (
            "executorch",
            "int8",
            "^leave export.quantize out, or train with distill.callbacks.Quantize$",
        ),
        ("onnx", None, "^set export.format=packed or dense$"),
    ],
)
def test_the_way_out_is_one_that_there_is(ready, format, quantize, said):
    ready[0].export = config.Export(format=format, quantize=quantize)
    needed, tolerance, way_out = runtime_proof.law(ready[0], 1.0, rounds=True)
    assert (needed, tolerance) == (runtime_proof.AGREEMENT_INT8, None) and re.match(said, way_out)


def test_what_rounds_less_must_agree_more(ready):
    def needed(rounds, **settings):
        ready[0].export = config.Export(format="openvino", **settings)
        return runtime_proof.law(ready[0], 1.0, rounds)[0]

    assert (
        needed(False)
        == 1
        > needed(False, dtype="bfloat16")
        == runtime_proof.AGREEMENT
        > needed(True)
        == runtime_proof.AGREEMENT_INT8
    )
    assert {needed(rounds, dtype="bfloat16", quantize="int8") for rounds in (False, True)} == {
        runtime_proof.AGREEMENT_INT8
    }


def test_a_program_that_needs_torch_is_refused(ready, monkeypatch):
    text = served_files.runtime_program("onnx", ready[1].pipeline)
    monkeypatch.setattr(served_files, "runtime_program", lambda *of: f"import torch\n{text}")
    with pytest.raises(RunFailed, match="torch is blocked: the program must run without it"):
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
    told = served_files.runtime_tokenizer(task, tokenizer)
    texts = type(raw).from_dict(long)
    rows = told.encode_batch(
        [row[0] if not pairs else row for row in zip(*long.values(), strict=True)]
    )
    batch = runtime_proof.given(
        replace(run, evaluate=config.Evaluate(batch_size=99)), task, texts, tokenizer
    ).batches[0]
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
        served_files.check(
            "onnx", models.load(str(ready[4] / "student"), None, ready[1], "student"), Slow()
        )


def test_a_calibrated_range_is_symmetric_and_a_trained_one_is_kept():
    assert quant_layers.input_quantization(None, [-1.0, 2.54], trained=False) == {
        "how": "static",
        "scale": pytest.approx(0.02),
        "zero": 0,
        "dtype": "int8",
    }
    trained = quant_layers.input_quantization(None, [-1.0, 2.0], trained=True)
    assert (trained["scale"], trained["zero"], trained["dtype"]) == (
        pytest.approx(3 / 255),
        85,
        "uint8",
    )


def test_the_command_line_exports_int8(ready, monkeypatch, capsys):
    run, task, raw, tokenizer, folder = ready
    compose.save_recipe(run, folder / "recipe.yaml")
    monkeypatch.setattr(export, "prepared", lambda run, folder: (task, raw, tokenizer))
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
    assert proof["agreement"] >= runtime_proof.AGREEMENT_INT8
    assert (
        8 * (final / "openvino_model.bin").stat().st_size / sum(map(torch.numel, parameters(ready)))
        < bits
    )
    if not settings:
        assert proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])
    assert "openvino" in (final / "README.md").read_text()


def parameters(ready):
    return models.load(str(ready[4] / "student"), None, ready[1], "student", ready[3]).parameters()


def test_openvino_keeps_trained_codes_and_ranges(ready):
    pytest.importorskip("openvino")
    quantized(ready[4], ready[1], ready[3], STATIC)
    assert proven(ready, format="openvino")[1]["max_difference"] < 1e-4
