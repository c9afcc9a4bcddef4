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

from distill import config, evaluate, fresh, models, recipe
from distill.data import BatchPlan
from distill.errors import UserError
from distill.evaluate import measure, table
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
    from distill.data import loader

    return measure.outcomes(task, {name: Fixed(rows) for name, rows in logits.items()}, loader(split, task, 0, 2))


def test_fidelity_is_the_share_of_equal_predictions_and_the_mean_divergence(task):
    teacher = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]
    student = [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]
    columns, followed = one_pass(task, examples([4, 3, 2, 1], [0, 1, 1, 0]), teacher=teacher, student=student)
    assert followed["agreement"] == 0.75
    p, q = torch.tensor(teacher).log_softmax(-1), torch.tensor(student).log_softmax(-1)
    assert followed["divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    assert task.quality(columns["teacher"])["accuracy"] == 1.0
    assert task.quality(columns["student"])["accuracy"] == 0.75


def test_windows_of_a_text_are_resampled_together():
    """In whatever order the windows were answered, their outcomes are added up text by text."""
    split = Dataset.from_dict({"length": [3, 5, 2, 4], "rows": [1, 1, 1, 1], "begins": [1, 0, 1, 1]})
    plan = BatchPlan(split, batch_size=2)
    order = [place for micro in plan for place in micro.indices]
    assert order == [1, 3, 0, 2]
    answered = torch.tensor([10.0**place for place in order])
    assert measure.by_text({"nll": answered}, split, plan)["nll"].tolist() == [11, 100, 1000]
    assert measure.by_text({"nll": answered}, split.remove_columns("begins"), plan)["nll"] is answered


def test_a_model_is_perfectly_faithful_to_itself(task):
    logits = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert one_pass(task, examples([1, 1, 1]), teacher=logits, student=logits)[1] == {"agreement": 1.0, "divergence": 0.0}


def test_outcomes_do_not_depend_on_the_teacher_being_there(task):
    logits = [[2.0, 0.0], [0.0, 1.0]]
    alone, followed = one_pass(task, examples([1, 2]), student=logits)
    together, _ = one_pass(task, examples([1, 2]), student=logits, teacher=[[0.0, 1.0]] * 2)
    assert followed == {}
    assert alone.keys() == {"student"}
    assert all((column == together["student"][name]).all() for name, column in alone["student"].items())


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
    singles, groups = measure.requests(task, examples([1, 2, 3]), 0, config.Evaluate(requests=50, batches=8, batch_size=32))
    assert len(singles) == 3
    assert [len(inputs["input_ids"]) for inputs in groups] == [3]


def test_requests_of_a_language_model_are_its_windows():
    task = CausalLanguageModelling(max_length=4)
    split = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "size": [2], "length": [3], "rows": [2]})
    singles, _ = measure.requests(task, split, 0, config.Evaluate(requests=1, batches=1))
    assert singles[0]["input_ids"] == [[1, 2, 3]]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (3, 10), (200, 200), (1, 1)])
def test_a_spread_has_distinct_places_in_order(size, count):
    places = measure.spread(size, count)
    assert len(places) == len(set(places)) == min(size, count)
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] < size


def metrics(teacher=True):
    quality = {"accuracy": {"value": 0.9, "low": 0.85, "high": 0.95}, "mcc": {"value": math.nan, "low": math.nan, "high": math.nan}}
    costs = {"parameters": 2_000_000, "disk_bytes": 8e6, "latency_p50_ms": 10.0, "examples_per_s": 100.0}
    machine = {
        "cpu": "A CPU", "device": "cpu", "threads": 1, "dtype": "float32", "attention": "eager", "torch": "2", "requests": 50, "batches": 8
    }  # fmt: skip
    found = {"split": "test", "examples": 200, "resamples": 1000, "student": {"quality": quality, "cost": costs}, "machine": machine}
    if teacher:
        found["teacher"] = {"quality": quality, "cost": {key: 2 * value for key, value in costs.items()}}
        gap = {"value": -0.01, "low": -0.03, "high": 0.004}
        found["comparison"] = {"metric": "accuracy", "maximise": True, "difference": gap, "p": 0.2}
        found["fidelity"] = {"agreement": 0.93, "divergence": 0.021, "name": "forward_kl"}
    return measure.finite(found)


def test_models_come_back_from_the_device_they_answered_on(monkeypatch):
    moves = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moves.append("emptied"))
    with pytest.raises(KeyboardInterrupt), models.on("cuda", SimpleNamespace(to=moves.append)):
        raise KeyboardInterrupt
    assert moves == ["cuda", "cpu", "emptied"]


def printed(found, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.table(found))
    return console.export_text()


def test_what_cannot_be_known_is_null_in_json():
    json.dumps(metrics(), allow_nan=False)
    assert metrics()["student"]["quality"]["mcc"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("teacher", [True, False])
def test_table_and_model_card_show_the_same_rows(teacher):
    found = metrics(teacher)
    terminal, card = printed(found), table.markdown(found)
    for row in table.rows(found):
        for cell in row[2:]:
            assert cell in terminal
            assert cell in card
    assert ("0.50x" in terminal) == ("0.93" in terminal) == teacher
    assert "0.900 [0.850, 0.950]" in terminal
    assert "nan" not in (terminal + card).lower()
    assert "…" not in terminal
    assert max(map(len, terminal.splitlines())) <= 100


def test_many_labels_do_not_crowd_the_table():
    found = metrics()
    for label in range(50):
        found["student"]["quality"][f"f1/{label}"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert [row.name for row in table.rows(found) if row.group == "quality"] == ["accuracy", "mcc"]


def test_labels_with_brackets_are_shown_as_they_are():
    found = metrics()
    found["student"]["quality"]["f1/[bold]"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert "f1/[bold]" in printed(found)


def test_a_narrow_terminal_loses_no_digit():
    words = set(printed(metrics(), width=80).replace("│", " ").split())
    assert {cell for row in table.rows(metrics()) for cell in " ".join(row[2:]).split()} <= words


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0.000"), (0.0123, "0.012"), (0.00042, "0.00042"), (12.345, "12.3"), (12345.6, "12,346"), (None, "")]
)
def test_numbers_have_the_digits_that_matter(value, shown):
    assert table.number(value) == shown


def test_metrics_are_stored_whole_or_not_at_all(tmp_path):
    evaluate.write({"a": 1}, tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        evaluate.write({"a": object()}, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}


def test_what_training_could_not_know_is_stored_as_null(tmp_path):
    evaluate.write({"training": {"best": {"val/pearson": -math.inf}}, "perplexity": math.nan}, tmp_path)
    assert evaluate.read(tmp_path) == {"training": {"best": {"val/pearson": None}}, "perplexity": None}


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
    with evaluate.status(SimpleNamespace(trainer=config.Trainer(progress=progress)), "measuring cost"):
        pass
    assert ("measuring cost" in said.getvalue()) == (terminal and progress)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=nowhere"], "run is nowhere, but there is no such folder"),
        (["run=."], "holds no recipe.yaml"),
        (["ruun=x"], "ruun is given, but there is no such key: did you mean run?"),
        (["run=x", "threads=two"], "threads: Value 'two'"),
        (["run=x", "split=dev"], "split is dev, but there is no such split: choose from train, validation, test"),
        (["x"], "x is given, but options are written key=value"),
        ([], "exactly one is needed"),
        (["run=x", "recipe=y"], "exactly one is needed"),
        (["run=x", "student=y"], "leave them out"),
        (["recipe=nonsense", "student=x"], "recipe is nonsense, but there is no such recipe"),
        (["run=x", "output=no/such/file.json"], "its folder does not exist"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_options_out_of_range_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_of_folder", lambda given: (SimpleNamespace(evaluate=config.Evaluate()), {}))
    with pytest.raises(UserError, match=r"evaluate\.requests is 0"):
        evaluate.described(evaluate.Options(run="x", requests=0))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder as training leaves it, with data of its own."""
    monkeypatch.setattr(fresh, "ask", tiny_runs.ask_here)
    monkeypatch.chdir(tmp_path)
    lines = [f"{text},{label}" for text, label in zip(tiny_runs.TEXTS * 3, ["no", "yes"] * 18, strict=True)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    run, *_ = tiny_runs.made(tmp_path, tiny_runs.classifier("no", "yes"))
    run.data = config.Data(source="texts.csv", train="train", validation=None, test=None, holdout=0.2)
    run.evaluate = config.Evaluate(bootstrap=20, requests=3, batches=2, batch_size=2)
    recipe.save(run, tmp_path / "recipe.yaml")
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
        assert found[who]["cost"].keys() >= {"latency_p50_ms", "examples_per_s", "disk_bytes", "memory_peak_bytes"}
    assert 0 <= found["fidelity"]["agreement"] <= 1
    assert found["comparison"]["metric"] == "accuracy"
    assert "accuracy" in capsys.readouterr().out


def test_the_command_line_measures_any_two_models_on_a_recipe(finished, monkeypatch, capsys):
    arguments = ["recipe=recipe.yaml", "teacher=teacher", "student=teacher", "split=validation", "output=found.json"]
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


def test_a_student_alone_is_measured_alone(finished, monkeypatch, capsys):
    called(monkeypatch, "recipe=recipe.yaml", "student=student", "output=found.json")
    found = json.loads((finished / "found.json").read_text())
    assert not {"teacher", "fidelity", "comparison"} & found.keys()


def test_a_missing_model_is_answered_in_one_sentence(finished, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "recipe=recipe.yaml", "student=./nowhere")
    assert ended.value.code == 2
    assert "student is ./nowhere, but there is no such folder" in capsys.readouterr().err
