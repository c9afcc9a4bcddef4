"""ExecuTorch exports equal the trained student at any shape; unsupported students are refused."""

import copy
import json

import pytest
import torch
from torch import nn

from distill import models
from distill.compress.quantizer import QuantSpec, fake_quantize_weight
from distill.errors import RunFailed, UserError
from distill.packing.graph import GraphOptions, input_names
from distill.tasks import CausalLanguageModelling
from tests.unit import tiny_runs

pytest.importorskip("executorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecated uses

from distill.packing import executorch as packing  # noqa: E402

DYNAMIC, FIXED = {"bits": 8, "range": None}, {"bits": 8, "range": [-1.0, 1.0]}


def ready(folder, model_type):
    task = (
        CausalLanguageModelling(max_length=16)
        if model_type == "gpt2"
        else tiny_runs.classifier("no", "perhaps", "yes")
    )
    return tiny_runs.made(folder, task, model_type)


def student_of(ready):
    return models.load(
        str(ready[4] / "student"), None, ready[1], "student", ready[3], strict=True
    ).eval()


def options(student, ready, quantize=None):
    inputs = input_names(student, ready[3])
    return GraphOptions(inputs, ready[1].max_length, quantize=quantize)


def written(folder, ready, quantize=None):
    """The program of the student, and the student as it was."""
    student = student_of(ready)
    packing.save(copy.deepcopy(student), options(student, ready, quantize), folder)
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    return Runtime.get().load_program(str(folder / packing.FILE)).load_method("forward"), student


def apart(method, student, rows, columns):
    """Maximum difference of the logits at this shape without padding, and the maximum logit."""
    ids, mask = (
        torch.randint(student.config.vocab_size, (rows, columns)),
        torch.ones(rows, columns, dtype=torch.long),
    )
    mask[-1, (columns + 1) // 2 :] = 0
    inputs = [ids, mask, torch.zeros_like(ids)][: method.metadata.num_inputs()]
    with torch.inference_mode():
        expected = models.logits(student, {"input_ids": ids, "attention_mask": mask})
    counted = mask.bool() if expected.dim() == 3 else torch.ones(rows, dtype=torch.bool)
    return float((method.execute(inputs)[0] - expected)[counted].abs().max()), max(
        1.0, float(expected.abs().max())
    )


SLOWER = [
    pytest.param("bert", marks=pytest.mark.slow),
    pytest.param("gpt2", marks=pytest.mark.slow),
]  # half a minute each


@pytest.mark.parametrize("model_type", ["distilbert", *SLOWER])
def test_one_program_answers_any_shape_in_float32(tmp_path, model_type):
    method, student = written(tmp_path, ready(tmp_path, model_type))
    for rows, columns in ((1, 1), (1, 7), (5, 12), (packing.MAX_BATCH, 3)):
        difference, scale = apart(method, student, rows, columns)
        assert difference <= 1e-5 * scale


@pytest.mark.parametrize("model_type", ["distilbert", *SLOWER[1:]])
def test_trained_codes_and_rounded_inputs_are_carried(tmp_path, model_type):
    made = ready(tmp_path, model_type)
    tiny_runs.quantized(made[4], made[1], made[3], DYNAMIC)
    method, student = written(tmp_path, made)
    differences = [apart(method, student, 1, columns) for columns in range(1, 12)]
    exact = [difference <= 1e-5 * scale for difference, scale in differences]
    assert sum(exact) >= 9  # another order of sums rounds an input to its neighbour now and then
    assert all(difference <= 0.05 * scale for difference, scale in differences)


def test_what_is_quantized_now_is_close_and_small(tmp_path):
    made = ready(tmp_path, "distilbert")
    method, student = written(tmp_path, made, "dynamic")
    difference, scale = apart(method, student, 8, 9)
    assert 0 < difference < 0.2 * scale


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 4])
def test_an_embedding_looks_up_what_was_trained(bits, symmetric, group):
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401

    weight, spec = torch.randn(20, 16), QuantSpec(bits=bits, symmetric=symmetric, group=group)
    coded, ids = packing.LookupEmbedding(weight, spec, "table"), torch.randint(20, (3, 5))
    assert torch.equal(coded(ids), fake_quantize_weight(weight, spec)[ids])
    assert coded.qweight.nbytes == weight.numel() // (2 if bits <= 4 else 1)


@pytest.mark.parametrize("group", [-1, 0])
@pytest.mark.parametrize("bits", [3, 8])
def test_integers_of_a_linear_layer_stand_for_what_was_trained(bits, group):
    pytest.importorskip("torchao")
    weight, spec = torch.randn(6, 16), QuantSpec(bits=bits, group=group)
    assert torch.equal(
        packing.int8_weight(weight, spec, "layer").dequantize(), fake_quantize_weight(weight, spec)
    )


@pytest.mark.parametrize(
    ("spec", "activations", "quantize", "value"),
    [
        ({"method": "codebook", "group": -1}, DYNAMIC, None, "method of .* is codebook"),
        ({"bits": 4, "group": 8}, DYNAMIC, None, "group of .* is 8"),
        ({}, FIXED, "dynamic", "executorch, but the inputs of .* to a fixed range"),
    ],
    ids=str,
)
def test_what_xnnpack_does_not_support_is_refused(tmp_path, spec, activations, quantize, value):
    made = ready(tmp_path, "distilbert")
    tiny_runs.quantized(made[4], made[1], made[3], activations, **spec)
    student = student_of(made)
    with pytest.raises(UserError, match=f"{value}.*: ") as error:
        packing.save(student, options(student, made, quantize), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / packing.FILE).exists()


def test_a_model_that_cannot_be_lowered_is_refused(tmp_path):
    made = ready(tmp_path, "distilbert")
    student = student_of(made)
    student.classifier = Branching()
    with pytest.raises(
        RunFailed,
        match="^export.format is executorch, but DistilBert.* cannot be lowered .*: choose",
    ) as error:
        packing.save(student, options(student, made), tmp_path)
    assert "\n" not in str(error.value)


class Branching(nn.Module):
    """What it does depends on a value, which no graph can say."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_it_stands_alone(tmp_path, quantize):
    """With the proof in its own process, which can import neither this library nor transformers."""
    made = tiny_runs.made(
        tmp_path,
        tiny_runs.classifier("no", "perhaps", "yes"),
        "distilbert",
        format="executorch",
        quantize=quantize,
        examples=6,
    )
    made[0].teacher = None  # such a small program is no smaller than a teacher's weights
    final = tiny_runs.exported(*made)
    proof = json.loads((final / "proof.json").read_text())
    assert proof["agreement"] == 1
    assert (proof["max_difference"] <= 1e-5 * max(1, proof["max_logit"])) == (quantize is None)
    assert {"model.pte", "tokenizer.json", "config.json", "README.md", "proof.json"} <= {
        file.name for file in final.iterdir()
    }
