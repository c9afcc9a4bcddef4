"""A student in several runtimes: names, measurements, the table, the command."""

import json

import pytest
from datasets import DatasetDict

from distill import evaluate, isolated
from distill.errors import RunFailed, UserError
from distill.evaluate import RUNTIMES, runtime_names, runtimes, runtimes_table
from distill.evaluate.records import Cost, Interval, Machine, RuntimeMetrics, RuntimesReport
from distill.evaluate.settings import MeasureSettings
from distill.prepare import Prepared
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
def test_a_name_stands_for_settings_of_the_export(name, settings):
    assert runtime_names.export_settings(name) == config.Export(**settings)


@pytest.mark.parametrize(
    "names",
    [[], ["torch", "torch"], ["tensorrt"], ["onnx_int3"], ["dense"], ["torch_int8"]],
    ids=str,
)
def test_unknown_and_repeated_runtimes_are_refused(names, monkeypatch):
    monkeypatch.setattr(capabilities, "check_export", lambda *settings: None)
    with pytest.raises(UserError, match="^runtimes (is|has) .*, but .*: "):
        runtime_names.check_runtimes(names, {})


def test_a_missing_package_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    with pytest.raises(UserError, match=r"^export.format is onnx, .*'distill\[onnx\]'"):
        runtime_names.check_runtimes(["torch", "onnx_int8"], {})


def test_auto_tries_the_runtimes_that_are_installed(monkeypatch):
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    assert runtime_names.available_runtimes({}) == ["torch", "torch_bf16", "torch_compile_bf16"]
    monkeypatch.setattr(capabilities, "installed_version", lambda package: "2099")
    assert set(runtime_names.available_runtimes({})) == {*runtime_names.AUTO}
    callbacks = {"q": {"_target_": "distill.callbacks.Quantize", "activations": "dynamic"}}
    assert "torch_compile_int8" not in runtime_names.available_runtimes(callbacks)


def prepared(task, tokenizer, raw):
    splits = DatasetDict(train=raw, test=raw)
    return Prepared(task, tokenizer, splits, splits)


def run_scripts(script, request):
    """A stand-in for `run_isolated`, in which compiling fails."""
    if script == "time_runtimes":
        cost = {f"latency_p{percent}_ms": 1.0 for percent in (50, 90, 99)}
        cost["examples_per_s"] = 1.0
        machine = {"cpu": "a CPU", "torch": "2", "threads": 1, "requests": 2, "batches": 1}
        return {"costs": dict.fromkeys(request["models"], cost), "machine": machine}
    if "torch_compile_bf16" in request["models"]:
        raise isolated.ProcessError("there is no compiler")
    texts = [text for batch in request["batches"] for text in batch]
    predictions = [[float(len(cells[0]) % 2), 0.5] for cells in texts]
    return {"predictions": predictions, "cost": {"memory_peak_bytes": 5}}


def test_runtimes_that_fail_are_left_out_only_where_they_were_chosen_here(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(isolated, "run_isolated", run_scripts)
    run, task, raw, tokenizer, folder = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    raw = raw.add_column("label", ["no", "yes"] * (len(raw) // 2))
    run.data = config.Data(source="x", text=["text"], label="label")
    run.evaluate = config.Evaluate(bootstrap=20, batch_size=5)
    paths = {name: str(folder / name) for name in ("teacher", "student")}
    arguments = (
        MeasureSettings.from_run(run),
        prepared(task, tokenizer, raw),
        paths,
        "test",
        ["torch", "torch_compile_bf16"],
    )
    report = runtimes.measure_runtimes(*arguments, skip_failing=True)
    assert list(report.runtimes) == ["teacher", "torch"]
    assert report.fastest == {"latency": "torch", "throughput": "torch"}
    assert "torch_compile_bf16 is left out: " in caplog.text
    assert report.runtimes["torch"].agreement.value == 1
    assert report.runtimes["torch"].quality.keys() >= {"accuracy", "macro_f1"}
    assert RuntimesReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(RunFailed, match="torch_compile_bf16 failed .there is no compiler."):
        runtimes.measure_runtimes(*arguments)


def result(agreement=1.0, quality=None, weight_bytes=1_000_000, **cost):
    interval = Interval(agreement, agreement - 0.1, agreement)
    return RuntimeMetrics(weight_bytes, interval, quality or {}, Cost(**cost))


def test_the_fastest_must_agree_with_the_student():
    results = {
        "a": result(1.0, latency_p50_ms=3.0, examples_per_s=9.0),
        "b": result(0.98, latency_p50_ms=2.0, examples_per_s=5.0),
        "c": result(0.9, latency_p50_ms=1.0, examples_per_s=20.0),
    }
    assert runtimes.find_fastest(results) == {"latency": "b", "throughput": "a"}
    assert runtimes.find_fastest({"c": results["c"]}) == {}


def test_timed_texts_are_truncated_to_what_the_model_reads(tmp_path):
    task = tiny_runs.classifier("no", "yes")
    tokenizer = tiny_runs.made(tmp_path, task)[3]
    for cells in (
        ["a cat sees the bird " * 20],
        ["she eats", "the old dog sees " * 20],
        ["she"],
        [""],
    ):
        truncated = task.truncate_request(cells, tokenizer)
        ids, expected = (
            tokenizer(*each, truncation=True, max_length=task.max_length)["input_ids"]
            for each in (truncated, cells)
        )
        assert ids == expected
        assert sum(map(len, truncated)) <= 5 * task.max_length


def test_ratios_refer_to_the_baseline():
    cost = {
        "latency_p50_ms": 4.0,
        "latency_p90_ms": 5.0,
        "latency_p99_ms": 6.0,
        "examples_per_s": 10.0,
        "memory_peak_bytes": int(2e8),
    }
    faster = cost | {"latency_p50_ms": 1.0, "examples_per_s": 25.0}
    accuracy = {"accuracy": Interval(0.8, 0.7, 0.9)}
    report = RuntimesReport(
        examples=5,
        baseline="teacher",
        metric="accuracy",
        runtimes={
            "teacher": result(0.9, accuracy, 4_000_000, **cost),
            "onnx": result(1.0, **faster),
        },
        fastest={},
        machine=Machine(cpu="a CPU", threads=1, torch="2", requests=3, batches=2),
    )
    teacher, onnx = runtimes_table.rows(report)
    assert len(teacher) == len(onnx) == len(runtimes_table.COLUMNS)
    assert (teacher[0], teacher[3]) == ("teacher", "0.800 [0.700, 0.900]")
    assert teacher[-2:] == ["1.00x", "1.00x"]
    assert (onnx[0], onnx[1], onnx[3], onnx[-2:]) == ("onnx", "1.000", "", ["0.25x", "2.50x"])
    assert runtimes_table.table(report).row_count == 2


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
def test_the_command_measures_and_writes_the_report(tmp_path):
    folder = run_folder(tmp_path)
    names = [
        "torch",
        "torch_bf16",
        *(["onnx", "onnx_int8"] if capabilities.installed_version("onnxruntime") else []),
    ]
    code, out, err = call(
        "evaluate", f"run={folder}", f"runtimes=[{','.join(names)}]", cwd=tmp_path
    )
    assert code == 0, err
    metrics = json.loads((folder / RUNTIMES).read_text())
    assert list(metrics["runtimes"]) == ["teacher", *names]
    assert metrics["runtimes"]["torch"]["agreement"]["value"] == 1
    for name, result in metrics["runtimes"].items():
        assert (
            name in out and result["bytes"] > 0 and result["quality"]["accuracy"]["low"] is not None
        )
        assert {
            "latency_p50_ms",
            "latency_p90_ms",
            "latency_p99_ms",
            "examples_per_s",
            "memory_peak_bytes",
        } <= result["cost"].keys()
    assert not (folder / "metrics.json").exists()


def test_the_command_refuses_an_unknown_runtime(tmp_path, monkeypatch, capsys):
    arguments = [f"run={run_folder(tmp_path)}", "runtimes=[tensorrt]"]
    monkeypatch.setattr("sys.argv", ["distill.evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "runtimes has tensorrt", "choose from")
