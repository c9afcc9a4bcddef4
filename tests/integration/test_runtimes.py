"""A student in several runtimes: what is asked for, what each is given, what is said of it, and the command."""

import json

import pytest
import torch
from datasets import Dataset

from distill.errors import RunFailed, UserError
from distill.evaluate import RUNTIMES, runtime_names, runtimes, serve, table
from distill.recipe import capabilities, compose, config
from tests.integration.commands import assert_one_sentence, call
from tests.unit import tiny_runs


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("onnx", {"format": "onnx"}),
        ("onnx_int8", {"format": "onnx", "quantize": "int8"}),
        ("onnx_static", {"format": "onnx", "quantize": "static"}),
        ("openvino_bf16", {"format": "openvino", "dtype": "bfloat16"}),
    ],
)
def test_a_name_says_how_the_student_is_written(name, settings):
    assert runtime_names.export_of(name) == config.Export(**settings)


@pytest.mark.parametrize(
    "names",
    [[], ["torch", "torch"], ["tensorrt"], ["onnx_int3"], ["dense"], ["torch_int8"]],
    ids=str,
)
def test_what_is_no_runtime_is_refused(names, monkeypatch):
    monkeypatch.setattr(capabilities, "check", lambda *given: None)
    with pytest.raises(UserError, match="^runtimes (is|has) .*, but .*: "):
        runtime_names.check_runtimes(
            tiny_runs.config.Run(name="x", task={}, student=config.Student(layers=[0])), names
        )


def test_a_missing_package_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    with pytest.raises(
        UserError,
        match=r"^export.format is onnx, but .* is not installed: pip install 'distill\[onnx\]'",
    ):
        runtime_names.check_runtimes(
            tiny_runs.config.Run(name="x", task={}, student=config.Student(layers=[0])),
            ["torch", "onnx_int8"],
        )


def test_what_is_likely_to_be_fast_is_tried_where_it_is_installed(monkeypatch):
    run = tiny_runs.config.Run(name="x", task={}, student=config.Student(layers=[0]))
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    assert runtime_names.available_runtimes(run) == ["torch", "torch_bf16", "torch_compile_bf16"]
    monkeypatch.setattr(capabilities, "installed_version", lambda package: "2099")
    assert set(runtime_names.available_runtimes(run)) == {*runtime_names.AUTO}
    run.callbacks["q"] = {"_target_": "distill.callbacks.Quantize", "activations": "dynamic"}
    assert "torch_compile_int8" not in runtime_names.available_runtimes(run)


def test_what_is_tried_and_fails_is_left_out(tmp_path, monkeypatch, caplog):
    run, task, raw, tokenizer, folder = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    names = {who: str(folder / who) for who in ("teacher", "student")}

    def refused(run, task, tokenizer, names, name, temporary):
        raise UserError(f"export.format is {name}, but it cannot hold this: leave it out")

    def alone(run, task, texts, form):
        if form["form"] == "torch_compile_bf16":
            raise RunFailed("there is no compiler, but each must answer: leave it out")
        return {"said": [[0.0, 1.0]] * len(texts), "costs": {}}

    def timed(run, texts, forms):
        return {
            "costs": {name: {"latency_p50_ms": 1.0, "examples_per_s": 1.0} for name in forms},
            "machine": {},
        }

    for name, double in (("_export", refused), ("_alone", alone), ("_timed", timed)):
        monkeypatch.setattr(runtimes, name, double)
    monkeypatch.setattr(
        runtimes, "_worth", lambda *given: {"agreement": {"value": 1.0}, "quality": {}}
    )
    wanted = ["torch", "torch_compile_bf16", "onnx"]
    metrics = runtimes.measure(run, task, raw, tokenizer, names, wanted, tried=True)
    assert list(metrics["runtimes"]) == ["teacher", "torch"] and metrics["fastest"] == {
        "latency": "torch",
        "throughput": "torch",
    }
    assert (
        "torch_compile_bf16 is left out: there is no compiler" in caplog.text
        and "onnx is left out: " in caplog.text
    )
    with pytest.raises(RunFailed, match="no compiler"):
        runtimes.measure(run, task, raw, tokenizer, names, wanted)


def test_the_fastest_must_be_correct():
    def found(agreement, latency, rate):
        return {
            "agreement": {"value": agreement},
            "cost": {"latency_p50_ms": latency, "examples_per_s": rate},
        }

    measured = {
        "teacher": found(1.0, 0.1, 99.0),
        "a": found(1.0, 3.0, 9.0),
        "b": found(0.98, 2.0, 5.0),
        "c": found(0.9, 1.0, 20.0),
    }
    assert runtimes.fastest(measured, ["a", "b", "c"]) == {"latency": "b", "throughput": "a"}
    assert runtimes.fastest(measured, ["c"]) == {}


def test_the_clock_gets_what_is_read_and_no_more(tmp_path):
    task = tiny_runs.classifier("no", "yes")
    tokenizer = tiny_runs.made(tmp_path, task)[3]
    for cells in (
        ["a cat sees the bird " * 20],
        ["she eats", "the old dog sees " * 20],
        ["she"],
        [""],
    ):
        read = runtimes._read(task, tokenizer, cells)
        whole, cut = (
            tokenizer(*each, truncation=True, max_length=task.max_length)["input_ids"]
            for each in (cells, read)
        )
        assert cut == whole
        assert sum(map(len, read)) <= 5 * task.max_length


class Backwards:
    """Says a text's length, and remembers in which order it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


def test_a_process_says_every_row_in_order(monkeypatch):
    answer = Backwards()
    monkeypatch.setattr(serve, "load", lambda served: answer)
    question = {"served": {"one": {}}, "batches": [[["abc"], ["a"]], [["ab", "c"]]], "every": True}
    assert serve.alone(question)["said"] == [[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    assert answer.asked == [["abc", "a"], [("ab", "c")]]  # a pair is a tuple, one text a string
    assert serve.alone(question | {"every": False})["said"] == [0, 0, 0]


COST = {
    "latency_p50_ms": 4.0,
    "latency_p90_ms": 5.0,
    "latency_p99_ms": 6.0,
    "examples_per_s": 10.0,
    "memory_peak_bytes": 2e8,
}
METRICS = {
    "examples": 5,
    "baseline": "teacher",
    "metric": "accuracy",
    "machine": {"cpu": "a processor", "threads": 1, "torch": "2", "requests": 3, "batches": 2},
    "runtimes": {
        "teacher": {
            "bytes": 4e6,
            "agreement": {"value": 0.9, "low": 0.8, "high": 0.95},
            "quality": {"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}},
            "cost": COST,
        },
        "onnx": {
            "bytes": 1e6,
            "agreement": {"value": 1.0, "low": 0.9, "high": 1.0},
            "quality": {},
            "cost": COST | {"latency_p50_ms": 1.0, "examples_per_s": 25.0},
        },
    },
}


def test_ratios_are_to_the_baseline():
    teacher, onnx = table.runtime_rows(METRICS)
    assert len(teacher) == len(onnx) == len(table.RUNTIME_COLUMNS)
    assert (teacher[0], teacher[3], teacher[-2:]) == (
        "teacher",
        "0.800 [0.700, 0.900]",
        ["1.00x", "1.00x"],
    )
    assert (onnx[0], onnx[1], onnx[3], onnx[-2:]) == ("onnx", "1.000", "", ["0.25x", "2.50x"])
    assert table.of_runtimes(METRICS).row_count == 2


def test_quality_is_that_of_the_rows_and_agreement_with_the_student(tmp_path):
    run, task, _, tokenizer, _ = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    run.data, run.evaluate = (
        config.Data(source="x", text=["text"], label="label"),
        config.Evaluate(bootstrap=20),
    )
    raw = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": ["yes", "yes", "no", "no"]})
    said = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    student = [[0.0, 9.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]
    worth = runtimes._worth(run, task, raw, tokenizer, said, student)
    assert (worth["agreement"]["value"], worth["quality"]["accuracy"]["value"]) == (0.75, 0.75)


def run_folder(path):
    """A run folder of a task with labels, whose source is a file."""
    run, _, raw, _, folder = tiny_runs.made(
        path, tiny_runs.classifier("no", "perhaps", "yes"), "distilbert"
    )
    labels = [("no", "perhaps", "yes")[place % 3] for place in range(len(raw))]
    raw.add_column("label", labels).to_csv(path / "texts.csv")
    run.data = config.Data(
        source=str(path / "texts.csv"), label="label", validation=None, test=None, holdout=0.4
    )
    run.evaluate = config.Evaluate(bootstrap=20, requests=2, batches=1, batch_size=2)
    compose.save_recipe(run, folder / "recipe.yaml")
    return folder


@pytest.mark.slow
def test_the_command_measures_and_stores(tmp_path):
    folder = run_folder(tmp_path)
    wanted = [
        "torch",
        "torch_bf16",
        *(["onnx", "onnx_int8"] if capabilities.installed_version("onnxruntime") else []),
    ]
    code, out, err = call(
        "evaluate", f"run={folder}", f"runtimes=[{','.join(wanted)}]", cwd=tmp_path
    )
    assert code == 0, err
    metrics = json.loads((folder / RUNTIMES).read_text())
    assert list(metrics["runtimes"]) == ["teacher", *wanted]
    assert metrics["runtimes"]["torch"]["agreement"]["value"] == 1
    for name, found in metrics["runtimes"].items():
        assert (
            name in out and found["bytes"] > 0 and found["quality"]["accuracy"]["low"] is not None
        )
        assert {
            "latency_p50_ms",
            "latency_p90_ms",
            "latency_p99_ms",
            "examples_per_s",
            "memory_peak_bytes",
        } <= found["cost"].keys()
    assert not (folder / "metrics.json").exists()


def test_the_command_refuses_in_a_sentence(tmp_path):
    code, _, err = call(
        "evaluate", f"run={run_folder(tmp_path)}", "runtimes=[tensorrt]", cwd=tmp_path
    )
    assert code == 2, err
    assert_one_sentence(err, "runtimes has tensorrt", "choose from")
