"""Scripts in isolated processes: what they can import, how they fail, what they measure."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill import isolated
from distill.isolated.scripts import (
    measurements,
    runtime_predictions,
    time_models,
    transformers_proof,
)

FOLDER = Path(isolated.__file__).parent


def program(tmp_path, text, **request):
    """The response to a request whose program is this text."""
    request |= {"folder": str(tmp_path), "program": text, "batches": [[["a"]]], "prompts": []}
    return isolated.run_isolated("program_proof", {"threads": 1, "logits": True} | request)


def test_a_failed_script_raises_its_error(tmp_path):
    with pytest.raises(isolated.ProcessError, match=r"^no such model$"):
        program(tmp_path, "import sys\nprint('noise')\nsys.exit('no such model')")


def test_a_killed_script_raises_the_signal(tmp_path):
    with pytest.raises(isolated.ProcessError, match="killed by signal 9"):
        program(tmp_path, "import os\nos.kill(os.getpid(), 9)")


def test_scripts_run_offline_with_the_requested_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    text = (
        "import os, numpy\nprint('noise')\nkeys = ('HF_HUB_OFFLINE', 'OMP_NUM_THREADS')\n"
        "def predict(texts): return numpy.array([[float(os.environ[key]) for key in keys]])"
    )
    assert program(tmp_path, text, threads=3)["outputs"] == [{"logits": [1.0, 3.0]}]


@pytest.mark.parametrize("package", ["distill", "torch"])
def test_blocked_packages_cannot_be_imported(tmp_path, package):
    text = f"import {package}.nn"
    with pytest.raises(isolated.ProcessError, match=f"{package} is blocked: an export must work"):
        program(tmp_path, text, blocked=["distill", "torch"])


def test_the_response_holds_versions(tmp_path):
    text = "import numpy\ndef predict(texts): return numpy.array([[0.0]])"
    versions = program(tmp_path, text, libraries=["numpy"])["versions"]
    assert versions.keys() == {"python", "numpy"}


def test_scripts_import_neither_the_library_nor_what_they_do_not_need():
    names = [path.stem for path in (FOLDER / "scripts").glob("*.py")]
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        f"from importlib import import_module\n"
        f"for name in {names}: import_module(f'scripts.{{name}}')\n"
        "print(sorted({'torch', 'distill', 'datasets', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"


@pytest.mark.slow
def test_the_code_of_a_model_is_imported_before_its_memory_is_measured(tmp_path):
    BertForSequenceClassification(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    module = "transformers.models.bert.modeling_bert"
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import transformers; transformers.AutoModelForSequenceClassification\n"
        "from scripts.model_memory import import_architecture\n"
        f"before = {module!r} in sys.modules\n"
        f"import_architecture({str(tmp_path)!r}, False)\n"
        f"print(before, {module!r} in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "False True\n"


def test_peak_memory_is_not_that_of_the_parent_process():
    allocated = bytearray(400 << 20)
    allocated[:: 1 << 12] = b"1" * len(allocated[:: 1 << 12])  # touches every page
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "from scripts.measurements import peak_memory; print(peak_memory())"
    )
    process = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert int(process.stdout) < 200 << 20 < measurements.peak_memory()


def calls(order, *names):
    """Three calls for each name, which append to `order`."""
    return {
        name: [lambda call=f"{name}{place}": order.append(call) for place in range(3)]
        for name in names
    }


def test_models_take_turns_and_the_warm_up_is_not_timed():
    order: list[str] = []
    seconds = measurements.interleave(calls(order, "a", "b"), warm_up=1)
    assert order == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_a_turn_may_be_of_several_calls():
    order: list[str] = []
    measurements.interleave(calls(order, "a", "b"), turn=2)
    assert order == ["a0", "a1", "b0", "b1", "b2", "a2"]


class Recorder(torch.nn.Module):
    """Notes the arguments of its calls; takes no token types."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.arguments = []

    def forward(self, input_ids, use_cache=True):
        self.arguments.append((input_ids.tolist(), use_cache))


def test_a_model_is_called_with_the_arguments_that_it_takes():
    model = Recorder()
    inputs = {"input_ids": torch.tensor([[4]]), "token_type_ids": torch.zeros(1, 1)}
    (call,) = time_models.model_calls(model, [inputs])
    call()
    assert model.arguments == [([[4]], False)]


def test_throughput_counts_tokens_without_padding():
    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    assert time_models.throughput([2.0], [batch]) == {"examples_per_s": 1.0, "tokens_per_s": 3.0}
    assert time_models.throughput([1.0, 1.0, 100.0], [batch] * 3)["examples_per_s"] == 2.0


def test_latency_is_in_milliseconds():
    assert measurements.latency([0.001] * 9 + [0.101]) == pytest.approx(
        {"latency_p50_ms": 1, "latency_p90_ms": 11, "latency_p99_ms": 92}, rel=0.01
    )


def test_runtime_predictions_are_in_the_order_of_the_texts(monkeypatch):
    batches = []

    def predict(texts):
        batches.append(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    monkeypatch.setattr(runtime_predictions, "load_runtime_model", lambda model: predict)
    request = {
        "models": {"onnx": {"program": ""}},
        "batches": [[["abc"], ["a"]], [["ab", "c"]]],
        "answer": "logits",
    }
    logits = runtime_predictions.run(request)["predictions"]
    assert logits == [[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    assert batches == [["abc", "a"], [("ab", "c")]]  # a pair is a tuple, a single text a string
    assert runtime_predictions.run(request | {"answer": "next_token"})["predictions"] == [0, 0, 0]


def language_model(cap=None):
    """A random language model; with `cap` its logits are bounded after the head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    settings = Gemma2Config(vocab_size=64, final_logit_softcapping=cap, **sizes, **heads)
    model = Gemma2ForCausalLM._from_config(settings, attn_implementation="eager")
    for tensor in model.parameters():
        tensor.data.mul_(20)
    return model.eval()


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_rows_of_a_proof_are_the_model_s_own_logits(monkeypatch, rows, cap):
    model, ids = language_model(cap), torch.arange(8)[None]
    monkeypatch.setattr(transformers_proof, "CHUNK_BYTES", 4 * 64 * rows)
    with torch.inference_mode():
        chunks = list(transformers_proof.logit_chunks(model, ids))
        logits_LV = model(input_ids=ids).logits[0]
    assert max(map(len, chunks)) <= rows
    torch.testing.assert_close(torch.cat(chunks), logits_LV)
    assert cap is None or logits_LV.abs().max() <= cap


def test_a_dtype_that_is_slower_is_left_out():
    seconds = {"stored": [1.0, 1.0, 9.0], "float16": [1.4, 1.4, 1.4], "bfloat16": [2.0, 2.0, 0.1]}
    outputs = {name: [{"seconds": one} for one in each] for name, each in seconds.items()}
    assert transformers_proof.without_slower(outputs).keys() == {"stored", "float16"}
