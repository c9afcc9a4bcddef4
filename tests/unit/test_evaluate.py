"""Outcomes of models, records, the table, and the command."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from distill import evaluate, isolated, models
from distill.compress import tokenizer_trim
from distill.data import Batching, BatchPlan
from distill.errors import UserError
from distill.evaluate import evaluate_command, inputs, measure, outcomes, table
from distill.evaluate.inputs import ModelInputs
from distill.evaluate.records import (
    Comparison,
    Cost,
    Fidelity,
    Interval,
    Machine,
    Metrics,
    ModelMetrics,
)
from distill.prepare import prepare
from distill.recipe import compose, config
from distill.tasks import CausalLanguageModelling, SingleLabelClassification, build_task
from tests.unit import tiny_runs


class Fixed(torch.nn.Module):
    """Returns fixed logits, by the first token of a text."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.table = torch.tensor(logits)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


@pytest.fixture
def task():
    task = SingleLabelClassification()
    task.names = ("no", "yes")
    return task


def examples(lengths, labels=None):
    columns = {
        "input_ids": [[place] * length for place, length in enumerate(lengths)],
        "labels": labels or [0] * len(lengths),
        "size": [1] * len(lengths),
        "length": list(lengths),
        "rows": [1] * len(lengths),
    }
    return Dataset.from_dict(columns)


def model_inputs(split):
    return ModelInputs(SimpleNamespace(pad_token_id=0), split)


def one_pass(task, split, **logits):
    loaded = {name: Fixed(rows) for name, rows in logits.items()}
    inputs = dict.fromkeys(loaded, model_inputs(split))
    return outcomes.collect_outcomes(
        task, loaded, outcomes.model_batches(task, inputs, BatchPlan(split, Batching(2)))
    )


def test_fidelity_is_the_share_of_equal_predictions_and_the_mean_divergence(task):
    teacher = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    student = [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]
    columns, fidelity = one_pass(
        task, examples([4, 3, 2, 1], [0, 1, 1, 0]), teacher=teacher, student=student
    )
    assert fidelity["student"].agreement == 0.75
    p, q = torch.tensor(teacher).log_softmax(-1), torch.tensor(student).log_softmax(-1)
    assert fidelity["student"].divergence == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean())
    )
    assert task.compute_metrics(columns["teacher"])["accuracy"] == 1.0
    assert task.compute_metrics(columns["student"])["accuracy"] == 0.75


def test_windows_of_a_text_are_summed():
    split = Dataset.from_dict(
        {"length": [3, 5, 2, 4], "rows": [1, 1, 1, 1], "first_window": [1, 0, 1, 1]}
    )
    plan = BatchPlan(split, Batching(2))
    order = [place for micro in plan for place in micro.indices]
    assert order == [1, 3, 0, 2]
    outcome = torch.tensor([10.0**place for place in order])
    assert outcomes.sum_by_text({"nll": outcome}, split, plan)["nll"].tolist() == [11, 100, 1000]
    assert (
        outcomes.sum_by_text({"nll": outcome}, split.remove_columns("first_window"), plan)["nll"]
        is outcome
    )


def test_a_model_has_perfect_fidelity_to_itself(task):
    logits = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    fidelity = one_pass(task, examples([1, 1, 1]), teacher=logits, student=logits)[1]
    assert fidelity == {"student": Fidelity(1.0, 0.0)}


def test_each_model_but_the_teacher_is_compared_with_it(task):
    teacher, dense, student = (
        [[2.0, 0.0], [0.0, 1.0]],
        [[2.0, 0.0], [0.0, 1.0]],
        [[0.0, 2.0], [0.0, 1.0]],
    )
    columns, fidelity = one_pass(
        task, examples([1, 1]), teacher=teacher, dense=dense, student=student
    )
    assert list(columns) == ["teacher", "dense", "student"]
    assert fidelity["dense"] == Fidelity(1.0, 0.0)
    assert fidelity["student"].agreement == 0.5
    alone = one_pass(task, examples([1, 1]), teacher=teacher, student=student)[1]
    assert alone == {"student": fidelity["student"]}


def test_models_with_different_token_ids_are_compared_example_by_example(task):
    """Other lengths of the same examples do not change the order of the batches."""
    split, trimmed = examples([1, 5, 3, 2], [0, 1, 1, 0]), examples([5, 1, 2, 9])
    logits = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    both = {"teacher": model_inputs(split), "student": model_inputs(trimmed)}
    batches = outcomes.model_batches(task, both, BatchPlan(split, Batching(2)))
    loaded = {"teacher": Fixed(logits), "student": Fixed(logits)}
    assert outcomes.collect_outcomes(task, loaded, batches)[1] == {"student": Fidelity(1.0, 0.0)}


def test_outcomes_do_not_depend_on_the_teacher_being_there(task):
    logits = [[2.0, 0.0], [0.0, 1.0]]
    alone, fidelity = one_pass(task, examples([1, 2]), student=logits)
    together, _ = one_pass(task, examples([1, 2]), student=logits, teacher=[[0.0, 1.0]] * 2)
    assert fidelity == {}
    assert alone.keys() == {"student"}
    assert all(
        (column == together["student"][name]).all() for name, column in alone["student"].items()
    )


def test_classes_beyond_the_shared_vocabulary_are_left_out_of_fidelity():
    student, teacher = outcomes._shared_classes(torch.ones(3, 5), torch.ones(3, 8))
    assert student.shape == teacher.shape == (3, 5)


def test_requests_are_single_and_batches_full_and_of_like_length(task):
    settings = config.Evaluate(requests=5, batches=3, batch_size=4)
    singles, groups = inputs.timed_inputs(task, model_inputs(examples(range(1, 31))), settings)
    assert [len(inputs["input_ids"]) for inputs in singles] == [1] * 5
    assert [len(inputs["input_ids"]) for inputs in groups] == [4] * 3
    widths = [len(inputs["input_ids"][0]) for inputs in groups]
    assert widths == sorted(widths)
    json.dumps([singles, groups])


def test_few_examples_give_fewer_requests_and_one_batch(task):
    singles, groups = inputs.timed_inputs(
        task,
        model_inputs(examples([1, 2, 3])),
        config.Evaluate(requests=50, batches=8, batch_size=32),
    )
    assert len(singles) == 3
    assert [len(inputs["input_ids"]) for inputs in groups] == [3]


def test_requests_of_a_language_model_are_its_windows():
    task = CausalLanguageModelling(max_length=4)
    split = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3]],
            "labels": [[-100, 2, 3]],
            "size": [2],
            "length": [3],
            "rows": [2],
        }
    )
    singles, _ = inputs.timed_inputs(
        task, model_inputs(split), config.Evaluate(requests=1, batches=1)
    )
    assert singles[0]["input_ids"] == [[1, 2, 3]]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (3, 10), (200, 200), (1, 1)])
def test_evenly_spaced_indices_are_distinct_and_sorted(size, count):
    indices = inputs.evenly_spaced(size, count)
    assert len(indices) == len(set(indices)) == min(size, count)
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] < size


def metrics(teacher=True, dense=False):
    quality = {
        "accuracy": Interval(0.9, 0.85, 0.95),
        "mcc": Interval(math.nan, math.nan, math.nan),
    }
    better = {"accuracy": Interval(0.91, 0.86, 0.96)}
    models = {"student": ModelMetrics(quality, cost(1))}
    models |= {"teacher": ModelMetrics(quality, cost(2))} if teacher else {}
    models |= {"dense": ModelMetrics(better, cost(1.5))} if dense else {}
    fidelity = {"student": Fidelity(0.93, 0.021)}
    fidelity |= {"dense": Fidelity(0.97, 0.013)} if dense else {}
    gap = Comparison("accuracy", True, Interval(-0.01, -0.03, 0.004), 0.2)
    return Metrics(
        split="test",
        examples=200,
        texts=200,
        models=models,
        resamples=1000,
        machine=Machine(cpu="A CPU", torch="2", threads=1, requests=50, batches=8),
        comparison=gap if teacher else None,
        fidelity=fidelity if teacher else None,
        divergence="forward_kl" if teacher else None,
    )


def cost(factor):
    return Cost(
        parameters=int(factor * 2_000_000),
        disk_bytes=int(factor * 8e6),
        bits_per_weight=factor * 7.77,
        latency_p50_ms=factor * 10.0,
        examples_per_s=factor * 100.0,
    )


def test_models_return_to_the_cpu_after_an_error(monkeypatch):
    moves = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moves.append("emptied"))
    with (
        pytest.raises(KeyboardInterrupt),
        models.on_device("cuda", SimpleNamespace(to=moves.append)),
    ):
        raise KeyboardInterrupt
    assert moves == ["cuda", "cpu", "emptied"]


def printed(measured, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table.table(measured))
    return console.export_text()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("teacher", [True, False])
def test_metrics_are_the_same_after_json(teacher, dense):
    written = metrics(teacher, dense).to_json()
    assert written["student"]["quality"]["mcc"] == {"value": None, "low": None, "high": None}
    assert Metrics.from_json(json.loads(json.dumps(written, allow_nan=False))).to_json() == written


def test_metrics_of_earlier_versions_are_read():
    written = metrics().to_json()
    del written["texts"]
    written["machine"] = {"cpu": "A CPU", "torch": "2", "threads": 1, "requests": 5, "batches": 2}
    written["student"]["cost"]["watts"] = 3
    assert Metrics.from_json(written).texts == 200


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("teacher", [True, False])
def test_table_and_model_card_show_the_same_rows(teacher, dense):
    measured = metrics(teacher, dense)
    terminal, card = printed(measured), table.markdown(measured)
    for row in table.rows(measured):
        for cell in row[2:]:
            assert cell in card
            assert all(part in terminal for part in cell.split(" ["))
    assert ("0.50x" in terminal) == ("0.93" in terminal) == teacher
    assert ("0.97" in terminal) == (teacher and dense)
    assert "0.900" in terminal
    assert "[0.850, 0.950]" in terminal
    assert "nan" not in (terminal + card).lower()
    assert "…" not in terminal
    assert max(map(len, terminal.splitlines())) <= 100


def cells(line):
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_three_models_have_a_column_each():
    measured = metrics(dense=True)
    lines = printed(measured).splitlines()
    assert cells(lines[1]) == ["", "teacher", "dense", "student", "ratio"]
    assert ["bytes on disk, MB", "16.0", "12.0", "8.000", "0.50x"] in [
        cells(line) for line in lines
    ]
    assert ["agreement with the teacher", "", "0.970", "0.930", ""] in [
        cells(line) for line in lines
    ]
    card = table.markdown(measured).splitlines()
    assert card[:2] == ["| | teacher | dense | student | ratio |", "|---|---:|---:|---:|---:|"]
    assert "| bytes on disk, MB | 16.0 | 12.0 | 8.000 | 0.50x |" in card
    assert {line.count("|") for line in card if line.startswith("|")} == {6}


def test_without_compression_its_rows_and_column_are_absent():
    measured = metrics()
    shown = printed(measured) + table.markdown(measured)
    assert cells(printed(measured).splitlines()[1]) == ["", "teacher", "student", "ratio"]
    assert table.markdown(measured).splitlines()[:3] == [
        "| | teacher | student | ratio |",
        "|---|---:|---:|---:|",
        "| **quality** | | | |",
    ]
    assert "dense" not in shown
    assert "bits per weight" not in shown
    assert "effective bits per weight" in printed(metrics(dense=True))


def test_many_labels_do_not_crowd_the_table():
    measured = metrics()
    for label in range(50):
        measured.models["student"].quality[f"f1/{label}"] = Interval(0.5, 0.4, 0.6)
    assert [row.name for row in table.rows(measured) if row.group == "quality"] == [
        "accuracy",
        "mcc",
    ]


def test_labels_with_brackets_are_shown_as_they_are():
    measured = metrics()
    measured.models["student"].quality["f1/[bold]"] = Interval(0.5, 0.4, 0.6)
    assert "f1/[bold]" in printed(measured)


@pytest.mark.parametrize("dense", [False, True])
def test_a_narrow_terminal_loses_no_digit(dense):
    words = set(printed(metrics(dense=dense), width=80).replace("│", " ").split())
    assert {
        cell for row in table.rows(metrics(dense=dense)) for cell in " ".join(row[2:]).split()
    } <= words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.000"),
        (0.0123, "0.012"),
        (0.00042, "0.00042"),
        (12.345, "12.3"),
        (12345.6, "12,346"),
        (None, ""),
    ],
)
def test_numbers_have_the_digits_that_matter(value, shown):
    assert table.format_number(value) == shown


def test_metrics_are_written_completely_or_not_at_all(tmp_path):
    evaluate.write_metrics(metrics(), tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        evaluate.write_metrics(replace(metrics(), training={"a": object()}), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics().to_json()


def test_infinite_values_of_training_are_written_as_null(tmp_path):
    training = {"best": {"val/pearson": -math.inf}}
    evaluate.write_metrics(replace(metrics(), training=training), tmp_path)
    assert evaluate.read_metrics(tmp_path).training == {"best": {"val/pearson": None}}


@pytest.mark.parametrize("content", [None, "", '{"a": 1', "[]", "\0", '{"split": "test"}'])
def test_damaged_metrics_are_not_read(tmp_path, content, caplog):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    assert evaluate.read_metrics(tmp_path) is None
    assert ("metrics.json is damaged" in caplog.text) == (content is not None)


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (False, True), (True, False)])
def test_progress_is_shown_in_terminals_only(terminal, progress, monkeypatch):
    stdout = io.StringIO()
    stdout.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stdout)
    with evaluate.status("measuring cost", progress):
        pass
    assert ("measuring cost" in stdout.getvalue()) == (terminal and progress)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "run is nowhere"),
        (["run=."], "run is ."),
        (["ruun=x"], "did you mean run?"),
        (["run=x", "threads=two"], "threads: Value 'two'"),
        (["run=x", "split=dev"], "split is dev"),
        (["x"], "is x"),
        ([], "run is None and recipe is None"),
        (["run=x", "recipe=y"], "run is x and recipe is y"),
        (["run=x", "student=y"], "run is x"),
        (["recipe=nonsense", "student=x"], "recipe is nonsense"),
        (["run=x", "output=no/such/file.json"], "output is no/such/file.json"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_options_out_of_range_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_command, "_read_run", lambda options: (config.Run(name="x"), {}))
    with pytest.raises(UserError, match=r"evaluate\.requests is 0"):
        evaluate_command.read_options(evaluate.Options(run="x", requests=0))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder as training leaves it, with data of its own."""
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    monkeypatch.chdir(tmp_path)
    lines = [
        f"{text},{label}"
        for text, label in zip(tiny_runs.TEXTS * 3, ["no", "yes"] * 18, strict=True)
    ]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    run, *_ = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    run.data = config.Data(
        source="texts.csv", train="train", validation=None, test=None, holdout=0.2
    )
    run.evaluate = config.Evaluate(bootstrap=20, requests=3, batches=2, batch_size=2)
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    return tmp_path


def read_json(folder):
    return json.loads((folder / "metrics.json").read_text())


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["distill.evaluate", *arguments])
    evaluate.main()


def test_the_command_line_measures_a_run_folder(finished, monkeypatch, capsys):
    called(monkeypatch, f"run={finished}", "threads=1")
    measured = json.loads((finished / "metrics.json").read_text())
    assert (measured["split"], measured["examples"]) == ("test", 7)
    for who in ("teacher", "student"):
        assert measured[who]["quality"].keys() >= {"accuracy", "macro_f1", "nll", "ece"}
        assert measured[who]["cost"].keys() >= {
            "latency_p50_ms",
            "examples_per_s",
            "disk_bytes",
            "memory_peak_bytes",
        }
    assert 0 <= measured["fidelity"]["agreement"] <= 1
    assert measured["comparison"]["metric"] == "accuracy"
    assert "accuracy" in capsys.readouterr().out


def test_the_command_line_measures_any_two_models_on_a_recipe(finished, monkeypatch, capsys):
    arguments = [
        "recipe=recipe.yaml",
        "teacher=teacher",
        "student=teacher",
        "split=validation",
        "output=other.json",
    ]
    called(monkeypatch, *arguments)
    measured = json.loads((finished / "other.json").read_text())
    assert measured["fidelity"] == {"agreement": 1.0, "divergence": 0.0, "name": "forward_kl"}
    assert measured["comparison"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert measured["comparison"]["p"] == 1.0
    assert measured["teacher"]["quality"] == measured["student"]["quality"]
    assert not (finished / "metrics.json").exists()


def test_measuring_a_run_again_keeps_what_its_training_reported(finished, monkeypatch, capsys):
    training, stages = {"steps": 6}, {"student": 1.5}
    earlier = replace(metrics(), training=training, stages=stages)
    evaluate.write_metrics(earlier, finished)
    called(monkeypatch, f"run={finished}")
    measured = evaluate.read_metrics(finished)
    assert (measured.training, measured.stages) == (training, stages)
    assert measured.fidelity != earlier.fidelity


def test_each_model_is_measured_with_its_own_tokenizer(finished, monkeypatch):
    called(monkeypatch, "recipe=recipe.yaml", "teacher=teacher", "student=student", "output=a.json")
    other = models.train_tokenizer(["quite another text", "and yet another"], 320)
    shutil.copytree(finished / "teacher", finished / "other")
    other.save_pretrained(finished / "other")
    called(monkeypatch, "recipe=recipe.yaml", "teacher=other", "student=student", "output=b.json")
    before, after = (json.loads((finished / name).read_text()) for name in ("a.json", "b.json"))
    assert before["student"]["quality"] == after["student"]["quality"]
    assert before["teacher"]["quality"] != after["teacher"]["quality"]


@pytest.fixture
def compressed(finished):
    """The same with a student that counts as compressed."""
    shutil.copytree(finished / "student", finished / "dense")
    return finished


def test_a_compressed_student_is_shown_beside_the_dense_one(compressed, monkeypatch, capsys):
    called(monkeypatch, f"run={compressed}")
    measured = read_json(compressed)
    models_ = ["teacher", "dense", "student"]
    assert [what for what in measured if what in models_] == models_
    assert measured["dense"]["quality"] == measured["student"]["quality"]
    assert measured["dense"]["cost"]["disk_bytes"] == measured["student"]["cost"]["disk_bytes"]
    assert measured["fidelity"]["dense"] == {
        key: measured["fidelity"][key] for key in ("agreement", "divergence")
    }
    out = capsys.readouterr()
    assert "dense" in out.out
    assert "effective bits per weight" in (compressed / "report.md").read_text()
    assert evaluate.find_models(compressed / "teacher", None) == {}


@pytest.mark.parametrize(
    "teacher",
    [
        config.Teacher(config={"model_type": "bert"}),
        config.Teacher(model="google/bert", finetune=config.Finetune()),
    ],
)
def test_a_teacher_that_the_run_made_is_not_fetched_from_the_hub(teacher, tmp_path):
    with pytest.raises(UserError, match="folder teacher"):
        evaluate.find_models(tmp_path, teacher)
    frozen = config.Teacher(model="google/bert")
    assert evaluate.find_models(tmp_path, frozen) == {"teacher": "google/bert"}


def test_the_student_is_measured_in_its_exported_form(compressed, monkeypatch, capsys):
    called(monkeypatch, f"run={compressed}")
    full = read_json(compressed)
    run = compose.load_recipe("recipe.yaml")
    run.export = config.Export(dtype="bfloat16")
    compose.save_recipe(run, compressed / "recipe.yaml")
    called(monkeypatch, f"run={compressed}")
    measured = read_json(compressed)
    assert [each["machine"]["dtype"] for each in (full, measured)] == ["float32", "bfloat16"]
    dense, student = (measured[what]["cost"] for what in ("dense", "student"))
    assert student["parameters"] == dense["parameters"]
    assert student["bits_per_weight"] < 0.6 * dense["bits_per_weight"]
    # All models are measured in the dtype that ships.
    assert dense["weight_bytes"] == student["weight_bytes"]
    assert measured["dense"]["quality"] == measured["student"]["quality"]
    nll = [each["dense"]["quality"]["nll"]["value"] for each in (full, measured)]
    assert nll[0] != nll[1]
    assert nll[0] == pytest.approx(nll[1], rel=0.05)
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=other.json")
    assert (
        json.loads((compressed / "other.json").read_text())["student"]["cost"]["bits_per_weight"]
        == dense["bits_per_weight"]
    )


@pytest.fixture
def trimmed(compressed):
    """The same with fewer texts, and a student without the tokens that occur in none of them."""
    lines = [
        line for line in (compressed / "texts.csv").read_text().splitlines() if "sees" not in line
    ]
    (compressed / "texts.csv").write_text("\n".join([*lines, *lines[1:]]) + "\n")
    tokenizer = models.load_tokenizer(str(compressed / "student"))
    student = AutoModelForSequenceClassification.from_pretrained(compressed / "student")
    ids = {
        i
        for ids in tokenizer([text for text in tiny_runs.TEXTS if "sees" not in text])["input_ids"]
        for i in ids
    }
    kept = tokenizer_trim.ids_to_keep(tokenizer, ids)
    assert len(kept) < len(tokenizer)
    student.config.compression = {"vocabulary": student.config.vocab_size}
    tokenizer_trim.trim_embeddings(student, kept)
    shutil.rmtree(compressed / "student")
    models.save(student, tokenizer_trim.trim_tokenizer(tokenizer, kept), compressed / "student")
    return compressed


def test_a_student_with_a_trimmed_vocabulary_reads_its_own_ids(trimmed, monkeypatch, capsys):
    called(monkeypatch, f"run={trimmed}")
    measured = read_json(trimmed)
    assert measured["student"]["quality"] == measured["dense"]["quality"]
    assert measured["fidelity"]["dense"] == {
        key: measured["fidelity"][key] for key in ("agreement", "divergence")
    }
    assert measured["student"]["cost"]["parameters"] < measured["dense"]["cost"]["parameters"]
    called(
        monkeypatch, "recipe=recipe.yaml", "student=student", "teacher=dense", "output=other.json"
    )
    assert json.loads((trimmed / "other.json").read_text())["fidelity"]["agreement"] == 1.0
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=alone.json")
    assert (
        json.loads((trimmed / "alone.json").read_text())["student"]["quality"]
        == measured["student"]["quality"]
    )


def test_cost_is_measured_on_the_ids_that_a_model_reads(trimmed, monkeypatch):
    timed = {}
    machine = metrics().machine
    monkeypatch.setattr(
        measure,
        "measure_costs",
        lambda request, inputs: (
            timed.update(inputs) or dict.fromkeys(request["models"], Cost()),
            machine,
        ),
    )
    run = compose.load_recipe("recipe.yaml")
    paths = evaluate.find_models(trimmed, run.teacher)
    task = build_task(run.task)
    tokenizers = evaluate_command.load_tokenizers(paths, task)
    prepared = prepare(task, run.data, run.seed, tokenizers, ["test"])
    evaluate.evaluate(run, prepared, trimmed)
    tokenizer = inputs.trimmed_tokenizer(paths["student"], prepared.tokenizer)
    student, dense, teacher = (timed[name].requests for name in ("student", "dense", "teacher"))
    assert dense == teacher
    highest = [
        max(i for call in calls for ids in call["input_ids"] for i in ids)
        for calls in (student, teacher)
    ]
    assert highest[0] < len(tokenizer) <= highest[1]
    for student_call, teacher_call in zip(student, teacher, strict=True):
        texts = [
            each.decode(call["input_ids"][0])
            for each, call in ((tokenizer, student_call), (prepared.tokenizer, teacher_call))
        ]
        assert texts[0] == texts[1]


def test_a_student_alone_is_measured_alone(finished, monkeypatch, capsys):
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=other.json")
    measured = json.loads((finished / "other.json").read_text())
    assert not {"teacher", "fidelity", "comparison"} & measured.keys()


def test_a_missing_model_is_refused(finished, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "recipe=recipe.yaml", "student=./nowhere")
    assert ended.value.code == 2
    assert "student is ./nowhere" in capsys.readouterr().err


def test_models_that_predict_other_tokens_are_not_compared():
    texts = ["the dog finds the red book"] * 5
    task = CausalLanguageModelling(max_length=16)
    first = models.train_tokenizer(texts, 300, task.special_tokens())
    state = json.loads(first.backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]  # texts have as many tokens, but others
    other = type(first)(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    made = {"student": ModelInputs(first, None), "teacher": ModelInputs(other, None)}
    assert not outcomes.have_same_rows(task, made)
    assert outcomes.have_same_rows(SingleLabelClassification(), made)
    assert outcomes.have_same_rows(task, made | {"teacher": made["student"]})
