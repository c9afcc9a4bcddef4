"""One pass over the examples, honest numbers, and one sentence for every wrong command line."""

import io
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from distill import evaluate, isolated, models
from distill.compress import tokenizer_trim
from distill.data import BatchPlan
from distill.errors import UserError
from distill.evaluate import measure, table
from distill.recipe import compose, config
from distill.tasks import CausalLanguageModelling, SingleLabelClassification
from tests.unit import tiny_runs


class Fixed(torch.nn.Module):
    """Answers the logits written down for the first token of a text."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.table = torch.tensor(logits)

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


def one_pass(task, split, **logits):
    from distill.data import make_loader

    return measure.outcomes(
        task, {name: Fixed(rows) for name, rows in logits.items()}, make_loader(split, task, 0, 2)
    )


def test_fidelity_is_the_share_of_equal_predictions_and_the_mean_divergence(task):
    teacher = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    student = [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]
    columns, followed = one_pass(
        task, examples([4, 3, 2, 1], [0, 1, 1, 0]), teacher=teacher, student=student
    )
    assert followed["student"]["agreement"] == 0.75
    p, q = torch.tensor(teacher).log_softmax(-1), torch.tensor(student).log_softmax(-1)
    assert followed["student"]["divergence"] == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean())
    )
    assert task.quality(columns["teacher"])["accuracy"] == 1.0
    assert task.quality(columns["student"])["accuracy"] == 0.75


def test_windows_of_a_text_are_resampled_together():
    """In whatever order the windows were answered, their outcomes are added up text by text."""
    split = Dataset.from_dict(
        {"length": [3, 5, 2, 4], "rows": [1, 1, 1, 1], "begins": [1, 0, 1, 1]}
    )
    plan = BatchPlan(split, batch_size=2)
    order = [place for micro in plan for place in micro.indices]
    assert order == [1, 3, 0, 2]
    answered = torch.tensor([10.0**place for place in order])
    assert measure.by_text({"nll": answered}, split, plan)["nll"].tolist() == [11, 100, 1000]
    assert (
        measure.by_text({"nll": answered}, split.remove_columns("begins"), plan)["nll"] is answered
    )


def test_a_model_is_perfectly_faithful_to_itself(task):
    logits = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    followed = one_pass(task, examples([1, 1, 1]), teacher=logits, student=logits)[1]
    assert followed == {"student": {"agreement": 1.0, "divergence": 0.0}}


def test_each_model_but_the_teacher_is_compared_with_it(task):
    teacher, dense, student = (
        [[2.0, 0.0], [0.0, 1.0]],
        [[2.0, 0.0], [0.0, 1.0]],
        [[0.0, 2.0], [0.0, 1.0]],
    )
    columns, followed = one_pass(
        task, examples([1, 1]), teacher=teacher, dense=dense, student=student
    )
    assert list(columns) == ["teacher", "dense", "student"]
    assert followed["dense"] == {"agreement": 1.0, "divergence": 0.0}
    assert followed["student"]["agreement"] == 0.5
    alone = one_pass(task, examples([1, 1]), teacher=teacher, student=student)[1]
    assert alone == {"student": followed["student"]}


def test_a_model_with_ids_of_its_own_is_matched_example_by_example(task):
    """Its encodings are of other lengths, which must not change the order in which examples are answered."""
    from distill.data import make_loader

    split, own = examples([1, 5, 3, 2], [0, 1, 1, 0]), examples([5, 1, 2, 9])
    logits = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    batches = make_loader(split, task, 0, 2)
    read = {
        "student": measure._batches(
            task, measure.ModelInputs(SimpleNamespace(pad_token_id=0), own), batches.plan
        )
    }
    models_ = {"teacher": Fixed(logits), "student": Fixed(logits)}
    assert measure.outcomes(task, models_, batches, read)[1] == {
        "student": {"agreement": 1.0, "divergence": 0.0}
    }


def test_outcomes_do_not_depend_on_the_teacher_being_there(task):
    logits = [[2.0, 0.0], [0.0, 1.0]]
    alone, followed = one_pass(task, examples([1, 2]), student=logits)
    together, _ = one_pass(task, examples([1, 2]), student=logits, teacher=[[0.0, 1.0]] * 2)
    assert followed == {}
    assert alone.keys() == {"student"}
    assert all(
        (column == together["student"][name]).all() for name, column in alone["student"].items()
    )


def test_classes_beyond_the_shared_vocabulary_are_left_out_of_fidelity():
    student, teacher = measure._same_classes(torch.ones(3, 5), torch.ones(3, 8))
    assert student.shape == teacher.shape == (3, 5)


def test_requests_are_single_and_batches_full_and_of_like_length(task):
    settings = config.Evaluate(requests=5, batches=3, batch_size=4)
    singles, groups = measure.requests(task, examples(range(1, 31)), 0, settings)
    assert [len(inputs["input_ids"]) for inputs in singles] == [1] * 5
    assert [len(inputs["input_ids"]) for inputs in groups] == [4] * 3
    widths = [len(inputs["input_ids"][0]) for inputs in groups]
    assert widths == sorted(widths)
    json.dumps([singles, groups])


def test_few_examples_give_fewer_requests_and_one_batch(task):
    singles, groups = measure.requests(
        task, examples([1, 2, 3]), 0, config.Evaluate(requests=50, batches=8, batch_size=32)
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
    singles, _ = measure.requests(task, split, 0, config.Evaluate(requests=1, batches=1))
    assert singles[0]["input_ids"] == [[1, 2, 3]]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (3, 10), (200, 200), (1, 1)])
def test_a_spread_has_distinct_places_in_order(size, count):
    places = measure.evenly_spaced(size, count)
    assert len(places) == len(set(places)) == min(size, count)
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] < size


def metrics(teacher=True, dense=False):
    quality = {
        "accuracy": {"value": 0.9, "low": 0.85, "high": 0.95},
        "mcc": {"value": math.nan, "low": math.nan, "high": math.nan},
    }
    costs = {
        "parameters": 2_000_000,
        "disk_bytes": 8e6,
        "bits_per_weight": 7.77,
        "latency_p50_ms": 10.0,
        "examples_per_s": 100.0,
    }
    machine = {
        "cpu": "A CPU", "device": "cpu", "threads": 1, "dtype": "float32", "attention": "eager", "torch": "2", "requests": 50, "batches": 8
    }  # fmt: skip
    found = {
        "split": "test",
        "examples": 200,
        "resamples": 1000,
        "student": {"quality": quality, "cost": costs},
        "machine": machine,
    }
    if teacher:
        found["teacher"] = {
            "quality": quality,
            "cost": {key: 2 * value for key, value in costs.items()},
        }
        gap = {"value": -0.01, "low": -0.03, "high": 0.004}
        found["comparison"] = {"metric": "accuracy", "maximise": True, "difference": gap, "p": 0.2}
        found["fidelity"] = {"agreement": 0.93, "divergence": 0.021, "name": "forward_kl"}
    if dense:
        better = {"accuracy": {"value": 0.91, "low": 0.86, "high": 0.96}}
        found["dense"] = {
            "quality": better,
            "cost": {key: 1.5 * value for key, value in costs.items()},
        }
    if teacher and dense:
        found["fidelity"]["dense"] = {"agreement": 0.97, "divergence": 0.013}
    return measure.finite(found)


def test_models_come_back_from_the_device_they_answered_on(monkeypatch):
    moves = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moves.append("emptied"))
    with (
        pytest.raises(KeyboardInterrupt),
        models.on_device("cuda", SimpleNamespace(to=moves.append)),
    ):
        raise KeyboardInterrupt
    assert moves == ["cuda", "cpu", "emptied"]


def printed(found, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.table(found))
    return console.export_text()


def test_what_cannot_be_known_is_null_in_json():
    json.dumps(metrics(), allow_nan=False)
    assert metrics()["student"]["quality"]["mcc"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("teacher", [True, False])
def test_table_and_model_card_show_the_same_rows(teacher, dense):
    found = metrics(teacher, dense)
    terminal, card = printed(found), table.markdown(found)
    for row in table.rows(found):
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
    found = metrics(dense=True)
    lines = printed(found).splitlines()
    assert cells(lines[1]) == ["", "teacher", "dense", "student", "ratio"]
    assert ["bytes on disk, MB", "16.0", "12.0", "8.000", "0.50x"] in [
        cells(line) for line in lines
    ]
    assert ["agreement with the teacher", "", "0.970", "0.930", ""] in [
        cells(line) for line in lines
    ]
    card = table.markdown(found).splitlines()
    assert card[:2] == ["| | teacher | dense | student | ratio |", "|---|---:|---:|---:|---:|"]
    assert "| bytes on disk, MB | 16.0 | 12.0 | 8.000 | 0.50x |" in card
    assert {line.count("|") for line in card if line.startswith("|")} == {6}


def test_without_compression_there_is_no_sign_of_it():
    found = metrics()
    shown = printed(found) + table.markdown(found)
    assert cells(printed(found).splitlines()[1]) == ["", "teacher", "student", "ratio"]
    assert table.markdown(found).splitlines()[:3] == [
        "| | teacher | student | ratio |",
        "|---|---:|---:|---:|",
        "| **quality** | | | |",
    ]
    assert "dense" not in shown
    assert "bits per weight" not in shown
    assert "effective bits per weight" in printed(metrics(dense=True))


def test_many_labels_do_not_crowd_the_table():
    found = metrics()
    for label in range(50):
        found["student"]["quality"][f"f1/{label}"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert [row.name for row in table.rows(found) if row.group == "quality"] == ["accuracy", "mcc"]


def test_labels_with_brackets_are_shown_as_they_are():
    found = metrics()
    found["student"]["quality"]["f1/[bold]"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert "f1/[bold]" in printed(found)


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
    assert table.number(value) == shown


def test_metrics_are_stored_whole_or_not_at_all(tmp_path):
    evaluate.write({"a": 1}, tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        evaluate.write({"a": object()}, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}


def test_what_training_could_not_know_is_stored_as_null(tmp_path):
    evaluate.write(
        {"training": {"best": {"val/pearson": -math.inf}}, "perplexity": math.nan}, tmp_path
    )
    assert evaluate.read(tmp_path) == {
        "training": {"best": {"val/pearson": None}},
        "perplexity": None,
    }


@pytest.mark.parametrize("content", [None, "", '{"a": 1', "[]", "\0"])
def test_damaged_metrics_are_none(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    assert evaluate.read(tmp_path) == {}


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (False, True), (True, False)])
def test_a_terminal_sees_a_sign_of_life(terminal, progress, monkeypatch):
    said = io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", said)
    with evaluate.status(
        SimpleNamespace(trainer=config.Trainer(progress=progress)), "measuring cost"
    ):
        pass
    assert ("measuring cost" in said.getvalue()) == (terminal and progress)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=nowhere"], "run is nowhere, but there is no such folder"),
        (["run=."], "holds no recipe.yaml"),
        (["ruun=x"], "ruun is given, but there is no such key: did you mean run?"),
        (["run=x", "threads=two"], "threads: Value 'two'"),
        (
            ["run=x", "split=dev"],
            "split is dev, but there is no such split: choose from train, validation, test",
        ),
        (["x"], "x is given, but options are written key=value"),
        ([], "exactly one is needed"),
        (["run=x", "recipe=y"], "exactly one is needed"),
        (["run=x", "student=y"], "leave them out"),
        (["recipe=nonsense", "student=x"], "recipe is nonsense, but there is no such recipe"),
        (["run=x", "output=no/such/file.json"], "its folder does not exist"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_sentence(
    arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_options_out_of_range_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate, "_of_folder", lambda given: (SimpleNamespace(evaluate=config.Evaluate()), {})
    )
    with pytest.raises(UserError, match=r"evaluate\.requests is 0"):
        evaluate.described(evaluate.Options(run="x", requests=0))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder as training leaves it, with data of its own."""
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.ask_here)
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


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["distill.evaluate", *arguments])
    evaluate.main()


def test_the_command_line_measures_a_run_folder(finished, monkeypatch, capsys):
    called(monkeypatch, f"run={finished}", "threads=1")
    found = json.loads((finished / "metrics.json").read_text())
    assert (found["split"], found["examples"]) == ("test", 7)
    for who in ("teacher", "student"):
        assert found[who]["quality"].keys() >= {"accuracy", "macro_f1", "nll", "ece"}
        assert found[who]["cost"].keys() >= {
            "latency_p50_ms",
            "examples_per_s",
            "disk_bytes",
            "memory_peak_bytes",
        }
    assert 0 <= found["fidelity"]["agreement"] <= 1
    assert found["comparison"]["metric"] == "accuracy"
    assert "accuracy" in capsys.readouterr().out


def test_the_command_line_measures_any_two_models_on_a_recipe(finished, monkeypatch, capsys):
    arguments = [
        "recipe=recipe.yaml",
        "teacher=teacher",
        "student=teacher",
        "split=validation",
        "output=found.json",
    ]
    called(monkeypatch, *arguments)
    found = json.loads((finished / "found.json").read_text())
    assert found["fidelity"] == {"agreement": 1.0, "divergence": 0.0, "name": "forward_kl"}
    assert found["comparison"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["comparison"]["p"] == 1.0
    assert found["teacher"]["quality"] == found["student"]["quality"]
    assert not (finished / "metrics.json").exists()


def test_measuring_a_run_again_keeps_what_is_known_of_its_training(finished, monkeypatch, capsys):
    of_training = {"training": {"steps": 6}, "stages": {"student": 1.5}}
    evaluate.write({"split": "test", "fidelity": "of old"} | of_training, finished)
    called(monkeypatch, f"run={finished}")
    found = evaluate.read(finished)
    assert found.items() >= of_training.items()
    assert found["fidelity"] != "of old"


def test_models_that_read_other_token_ids_are_refused(finished, monkeypatch, capsys):
    other = models.train_tokenizer(["quite another text", "and yet another"], 320, True)
    shutil.copytree(finished / "teacher", finished / "other")
    other.save_pretrained(finished / "other")
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "recipe=recipe.yaml", "teacher=other", "student=student")
    assert ended.value.code == 2
    assert "the vocabularies of student and teacher differ at" in capsys.readouterr().err


@pytest.fixture
def compressed(finished):
    """The same with a student that was another before it was compressed."""
    shutil.copytree(finished / "student", finished / "dense")
    return finished


def test_a_compressed_student_is_shown_beside_what_it_was(compressed, monkeypatch, capsys):
    called(monkeypatch, f"run={compressed}")
    found = evaluate.read(compressed)
    models_ = ["teacher", "dense", "student"]
    assert [what for what in found if what in models_] == models_
    assert found["dense"]["quality"] == found["student"]["quality"]
    assert found["dense"]["cost"]["disk_bytes"] == found["student"]["cost"]["disk_bytes"]
    assert found["fidelity"]["dense"] == {
        key: found["fidelity"][key] for key in ("agreement", "divergence")
    }
    out = capsys.readouterr()
    assert "dense" in out.out
    assert "effective bits per weight" in (compressed / "report.md").read_text()
    assert "dense" not in evaluate.of_run(
        config.Run(name="x", teacher=None), compressed / "teacher"
    )


def test_the_student_is_measured_as_it_ships(compressed, monkeypatch, capsys):
    run = compose.load_recipe("recipe.yaml")
    run.export = config.Export(dtype="bfloat16")
    compose.save_recipe(run, compressed / "recipe.yaml")
    called(monkeypatch, f"run={compressed}")
    found = evaluate.read(compressed)
    dense, student = (found[what]["cost"] for what in ("dense", "student"))
    assert student["parameters"] == dense["parameters"]
    assert student["bits_per_weight"] < 0.6 * dense["bits_per_weight"]
    nll = [found[what]["quality"]["nll"]["value"] for what in ("dense", "student")]
    assert nll[0] != nll[1]
    assert nll[0] == pytest.approx(nll[1], rel=0.05)
    called(
        monkeypatch, "recipe=recipe.yaml", "student=student", "output=found.json"
    )  # any other folder is what it is
    assert (
        json.loads((compressed / "found.json").read_text())["student"]["cost"]["bits_per_weight"]
        == dense["bits_per_weight"]
    )


@pytest.fixture
def trimmed(compressed):
    """The same with fewer texts, and a student that has lost the tokens that occur in none of them."""
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


def test_a_student_with_a_trimmed_vocabulary_is_given_its_own_ids(trimmed, monkeypatch, capsys):
    called(monkeypatch, f"run={trimmed}")
    found = evaluate.read(trimmed)
    assert found["student"]["quality"] == found["dense"]["quality"]
    assert found["fidelity"]["dense"] == {
        key: found["fidelity"][key] for key in ("agreement", "divergence")
    }
    assert found["student"]["cost"]["parameters"] < found["dense"]["cost"]["parameters"]
    called(
        monkeypatch, "recipe=recipe.yaml", "student=student", "teacher=dense", "output=found.json"
    )
    assert json.loads((trimmed / "found.json").read_text())["fidelity"]["agreement"] == 1.0
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=alone.json")
    assert (
        json.loads((trimmed / "alone.json").read_text())["student"]["quality"]
        == found["student"]["quality"]
    )


def test_cost_is_measured_on_the_ids_that_a_model_reads(trimmed, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        measure.cost,
        "measure",
        lambda *given, own: asked.update(own, shared=given[2:4]) or ({}, {}),
    )
    run = compose.load_recipe("recipe.yaml")
    names = evaluate.of_run(run, trimmed)
    task, raw, encoded, tokenizer = evaluate.prepared(run, names, "test")
    read = measure.inputs_by_model(
        run, task, raw, measure.ModelInputs(tokenizer, encoded), names, "test"
    )
    measure._costs(run, task, read, {}, "cpu")
    assert asked.keys() == {"shared", "student"}
    highest = [
        max(i for call in calls for ids in call["input_ids"] for i in ids)
        for calls in (asked["student"][0], asked["shared"][0])
    ]
    assert highest[0] < len(read["student"].tokenizer) <= highest[1]
    for ours, theirs in zip(asked["student"][0], asked["shared"][0], strict=True):
        texts = [
            each.tokenizer.decode(call["input_ids"][0])
            for each, call in ((read["student"], ours), (read["teacher"], theirs))
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("defect", ["unmarked", "of another tokenizer"])
def test_other_ids_are_refused_for_any_other_reason(trimmed, monkeypatch, capsys, defect):
    if defect == "unmarked":
        settings = json.loads((trimmed / "student" / "config.json").read_text())
        (trimmed / "student" / "config.json").write_text(json.dumps(settings | {"compression": {}}))
    else:
        models.train_tokenizer(
            ["quite another text", "and yet another"], 320, True
        ).save_pretrained(trimmed / "student")
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, f"run={trimmed}")
    assert ended.value.code == 2
    assert "the vocabularies of student and teacher differ at" in capsys.readouterr().err


def test_a_student_alone_is_measured_alone(finished, monkeypatch, capsys):
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=found.json")
    found = json.loads((finished / "found.json").read_text())
    assert not {"teacher", "fidelity", "comparison"} & found.keys()


def test_a_missing_model_is_answered_in_one_sentence(finished, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "recipe=recipe.yaml", "student=./nowhere")
    assert ended.value.code == 2
    assert "student is ./nowhere, but there is no such folder" in capsys.readouterr().err
