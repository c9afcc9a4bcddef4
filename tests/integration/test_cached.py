"""Exported language models with a KV cache: equal logits step by step, and `generate`'s tokens."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill import models
from distill.compress import structure, widths
from distill.errors import RunFailed, UserError
from distill.export import verify_program
from distill.export.checks import Tolerance
from distill.export.proof_record import Generated
from distill.isolated.scripts.runtime_models import load_program
from distill.models import blocks
from distill.packing import ExportSpec, kv_cache, runtime_folder
from distill.packing.graph import GraphOptions
from distill.recipe import config
from distill.tasks import CausalLanguageModelling
from distill.tasks.generation import start_token
from tests.unit import tiny_runs
from tests.unit.tiny_runs import exported, made

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from distill.packing import onnx as packing  # noqa: E402

TASK = CausalLanguageModelling(max_length=16)
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 40,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "pruned llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4},
    "qwen3": LLAMA | {"head_dim": 8},
}


def slow(*row):
    """A row that is not tried by default: each writes a graph."""
    return pytest.param(*row, marks=pytest.mark.slow)


def model(name):
    """A random one of 50 tokens, whose layers may keep unequal numbers of key heads."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name.split()[-1], vocab_size=50, **SIZES[name])
    ).eval()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.mul_(3)
    if name.startswith("pruned"):
        structure.remove_groups(structure.heads(made, blocks(made)[0]), torch.tensor([False, True]))
        widths.update_config(made)
        made.config.compression = {"shapes": widths.update_config(made)}
        from distill.remote_code.modeling import update_key_groups

        update_key_groups(made)
    return made


def empty(states, texts):
    return [state.zeros(texts, 0) for state in states]


def in_pieces(step, states, ids, mask, cuts):
    """Logits of all tokens, (B, L, C), read in pieces that begin at the cuts."""
    past, parts = empty(states, len(ids)), []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        logits, *past = step(ids[:, start:end], mask[:, :end], *past)
        parts.append(logits)
    return torch.cat(parts, 1)


def alone(student, ids, mask):
    """Logits of the tokens that count, each text on its own and at once."""
    rows = zip(ids, mask.bool(), strict=True)
    return torch.cat(
        [models.logits(student, {"input_ids": row[None, counted]})[0] for row, counted in rows]
    )


def runtime(folder, states):
    """The stored graph as a function of tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / packing.FILE)
    assert [each.name for each in session.get_inputs()] == [
        "input_ids",
        "attention_mask",
        *(f"{kv_cache.PAST}.{each.name}" for each in states),
    ]

    def step(*tensors):
        named = zip(session.get_inputs(), tensors, strict=True)
        return [
            torch.from_numpy(each)
            for each in session.run(None, {each.name: tensor.numpy() for each, tensor in named})
        ]

    return step


SHAPES = [(1, 1, ()), (1, 6, (1, 2, 3, 4, 5)), (3, 9, (4, 5, 6)), (5, 12, (1, 7)), (2, 12, ())]


def assert_cached_is_uncached(name, step, student, states):
    """Random batch sizes, new tokens and cached tokens, with padding on either side, between or
    none.
    """
    for texts, length, cuts in SHAPES:
        ids = torch.randint(50, (texts, length))
        between = (
            (0, 0) if name == "mistral" else (cuts[-1] - 1, cuts[-1]) if cuts else (0, 0)
        )  # its window would count such padding
        for padded in ((0, 0), (0, length // 3), (length - 1, length), between):
            mask = torch.ones_like(ids)
            mask[1:, slice(*padded)] = 0
            logits, expected = (
                in_pieces(step, states, ids, mask, cuts)[mask.bool()],
                alone(student, ids, mask),
            )
            assert float((logits - expected).abs().max()) <= 1e-5 * max(
                1.0, float(expected.abs().max())
            )


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_cached_logits_are_those_of_the_complete_text(name):
    student = model(name)
    entries = kv_cache.cache_entries(student)
    assert len({state.heads for state in entries}) == (2 if name.startswith("pruned") else 1)
    assert_cached_is_uncached(name, kv_cache.CachedForward(student), student, entries)


@pytest.mark.parametrize("name", ["pruned llama", slow("gpt2"), slow("mistral"), slow("qwen3")])
@torch.inference_mode()
def test_the_graph_is_equal_too(tmp_path, name, tokenizer):
    student = model(name)
    entries = kv_cache.cache_entries(student)
    options = GraphOptions(["input_ids", "attention_mask"], TASK.max_length, cache=True)
    assert packing.save(student, options, tmp_path)
    assert_cached_is_uncached(name, runtime(tmp_path, entries), student, entries)
    stored = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in onnx.load(tmp_path / packing.FILE).graph.initializer
    }
    weights = sum(tensor.numel() for tensor in student.parameters())
    assert sum(tensor.size for tensor in stored.values()) <= 1.02 * weights + 2000  # each once


@pytest.fixture
def tokenizer(tmp_path):
    return made(tmp_path / "run", TASK, "gpt2")[3]


@pytest.mark.parametrize("break_it", ["other architecture", "other answers", "refuses"])
def test_what_cannot_be_handed_back_is_not_kept(monkeypatch, break_it):
    """Models of other states, answers that change, models that refuse what they gave."""
    if break_it == "other architecture":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        assert (
            kv_cache.cache_entries(
                AutoModelForCausalLM.from_config(
                    AutoConfig.for_model("mamba", vocab_size=50, **sizes)
                )
            )
            == []
        )
        return
    forward = kv_cache.CachedForward.forward

    def error(self, ids, mask, *states):
        if break_it == "refuses":
            raise TypeError("no such argument")
        return forward(self, ids, mask, *(torch.zeros_like(state) for state in states))

    monkeypatch.setattr(kv_cache.CachedForward, "forward", error)
    assert kv_cache.cache_entries(model("gpt2")) == []


def proven(ready, **settings):
    run, *rest = ready
    run.export = config.Export(**{"format": "onnx"} | settings)
    final = exported(replace(run, evaluate=config.Evaluate(batch_size=5, bootstrap=20)), *rest)
    return final, json.loads((final / "proof.json").read_text())


def program_of(final, monkeypatch, format="onnx"):
    monkeypatch.chdir(final)
    return load_program(final, runtime_folder.runtime_program(format, TASK))


def generated(ready, text, most):
    """What transformers' own loop writes."""
    student = models.load(str(ready[4] / "student"), None, TASK, "student", ready[3]).eval()
    ids = torch.tensor(
        [
            [
                *start_token(ready[3]),
                *ready[3](text, add_special_tokens=False)["input_ids"],
            ]
        ]
    )
    options = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
    return student.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, ids.shape[1] :
    ].tolist()


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_program_writes_what_generate_writes(tmp_path, monkeypatch, format):
    if format == "openvino":
        pytest.importorskip("openvino")
    ready = made(tmp_path, TASK, "gpt2", teacher_layers=40)
    final, proof = proven(ready, format=format)
    assert proof["cached"] and proof["generated"] == {
        "tokens": verify_program.PROMPTS * verify_program.NEW_TOKENS,
        "agreement": 1.0,
    }
    assert "past_key_values.*" in (final / "README.md").read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write = program_of(final, monkeypatch, format)["generate"]
    for text in ("she", "a cat sees the", "the old dog eats"):
        assert write(text, 10) == generated(ready, text, 10)
    assert len(write(tiny_runs.TEXTS[0], 99)) <= 40  # no place is left
    (final / "program.py").write_text(runtime_folder.runtime_program(format, TASK))
    done = subprocess.run(
        [sys.executable, "program.py", "she", "a cat"],
        cwd=final,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.partition(" | ")[0] for line in done.stdout.splitlines() if " | " in line] == [
        "she",
        "a cat",
    ]


@pytest.mark.parametrize("where", ["its states", slow("its graph")])
def test_without_a_cache_it_reads_all_again(tmp_path, monkeypatch, where):
    ready = made(tmp_path, TASK, "gpt2", teacher_layers=40)
    if where == "its states":
        monkeypatch.setattr(kv_cache, "cache_entries", lambda model: [])
    else:
        trace = packing.trace

        def without_cache(graph, model, format):
            if isinstance(graph.module, kv_cache.CachedForward):
                raise UserError("no such operator")
            return trace(graph, model, format)

        monkeypatch.setattr(packing, "trace", without_cache)
    final, proof = proven(ready)
    assert not proof["cached"] and proof["generated"]["agreement"] == 1
    assert "keys and values are not cached" in (final / "README.md").read_text()
    assert program_of(final, monkeypatch)["generate"]("she", 5) == generated(ready, "she", 5)


@pytest.mark.parametrize("how", ["dynamic", slow("static"), slow("weights")])
def test_integers_are_cached_too(tmp_path, monkeypatch, how):
    monkeypatch.setattr(
        verify_program, "AGREEMENT_INT8", 0.5
    )  # the next tokens of a random model are close calls
    monkeypatch.setattr(
        ExportSpec,
        "calibration_inputs",
        lambda spec: [
            {"input_ids": torch.tensor([spec.tokenizer(text)["input_ids"]])}
            for text in tiny_runs.TEXTS
        ],
    )
    final, proof = proven(made(tmp_path, TASK, "gpt2", teacher_layers=40), quantize=how)
    assert proof["cached"] and proof["generated"]["agreement"] > 0.5
    operators = {node.op_type for node in onnx.load(final / packing.FILE).graph.node}
    assert ("MatMulInteger" in operators, "QuantizeLinear" in operators) == (
        how == "dynamic",
        how == "static",
    )
    assert isinstance(
        program_of(final, monkeypatch)["predict"](["she", "a cat sees"]), numpy.ndarray
    )


def test_a_program_that_writes_other_tokens_is_refused(tmp_path, monkeypatch):
    """Such as one whose cache is of another text."""
    text = runtime_folder.runtime_program("onnx", TASK)
    monkeypatch.setattr(
        runtime_folder,
        "runtime_program",
        lambda *of: text.replace("logits[0, -1].argmax()", "logits[0, -1].argmin()"),
    )
    ready = made(tmp_path, TASK, "gpt2", teacher_layers=40)
    with pytest.raises(
        RunFailed,
        match="the export is not equal: 0.00% of the 32 tokens that it generated are the "
        "student's, but 100% must",
    ):
        proven(ready)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize(
    ("right", "needed", "passes"),
    [(32, 1.0, True), (31, 1.0, False), (30, 0.97, True), (20, 0.97, False)],
)
def test_a_few_tokens_are_judged_by_their_interval(tmp_path, right, needed, passes):
    generated_tokens = Generated(32, right / 32)
    tolerance = Tolerance(needed, None, "way out")
    if passes:
        verify_program.check_generated(generated_tokens, tolerance, tmp_path)
        return
    with pytest.raises(RunFailed, match=f"{needed:.0%} must be the same: way out"):
        verify_program.check_generated(generated_tokens, tolerance, tmp_path)
