"""Settings of generation and of lm-eval, and its metrics."""

import json
import math
import sys
from dataclasses import replace

import pytest

from distill import isolated
from distill.errors import UserError
from distill.evaluate import cost, lm_eval_tasks
from distill.evaluate.lm_eval_tasks import check_settings
from distill.recipe import config
from distill.tasks import CausalLanguageModelling, SingleLabelClassification
from tests.unit import tiny_runs
from tests.unit.test_replies import prepared


def test_a_task_that_does_not_generate_is_refused():
    task = SingleLabelClassification()
    check_settings(config.Evaluate(), task)
    for key, value in (("generate", True), ("harness", ["arc_easy"])):
        with pytest.raises(UserError, match=f"evaluate.{key} is .*SingleLabelClassification"):
            check_settings(config.Evaluate(**{key: value}), task)


def test_harness_without_lm_eval_or_its_folder_is_refused(monkeypatch, tmp_path):
    task = CausalLanguageModelling()
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"evaluate.harness is \[arc_easy\].*distill\[harness\]"):
        check_settings(config.Evaluate(harness=["arc_easy"]), task)
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="evaluate.harness_path is nowhere"):
        check_settings(config.Evaluate(harness=["arc_easy"], harness_path="nowhere"), task)


@pytest.mark.parametrize(("key", "value"), [("harness_path", "tasks"), ("harness_limit", 3)])
def test_settings_of_no_task_are_refused(key, value):
    with pytest.raises(UserError, match=f"evaluate.{key} is {value}, but evaluate.harness"):
        config.Evaluate(**{key: value})


LM_EVAL = {
    "__init__": """
def simple_evaluate(model, tasks, task_manager, limit, log_samples):
    width = model.pretrained.config.num_hidden_layers
    values = {"alias": "it", "acc,none": width / 10, "acc_stderr,none": 0.05}
    values |= {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "limit,none": limit}
    return {"results": {task: values for task in tasks}}
""",
    "tasks": """
from pathlib import Path

class TaskManager:
    def __init__(self, include_path=None):
        self.all_tasks = ["arc_easy", *([Path("name").read_text()] if include_path else [])]
""",
    "models/huggingface": """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        self.pretrained = pretrained
        assert len(tokenizer) == pretrained.config.vocab_size
        assert batch_size == 4
""",
}


@pytest.fixture
def fake_lm_eval(monkeypatch, tmp_path):
    for module, text in LM_EVAL.items():
        file = tmp_path / "site" / "lm_eval" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)
    monkeypatch.chdir(tmp_path)  # the script changes to the folder of the tasks
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "name").write_text("mine")
    yield tmp_path / "tasks"
    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[module]


def test_metrics_of_lm_eval(tmp_path, fake_lm_eval):
    settings = config.Evaluate(
        harness=["arc_easy", "mine"],
        harness_path=str(fake_lm_eval),
        harness_limit=3,
        batch_size=4,
    )
    made = prepared(tmp_path / "run")
    check_settings(settings, made[1])
    with pytest.raises(UserError, match="evaluate.harness has mime, "):
        check_settings(replace(settings, harness=["arc_easy", "mime"]), made[1])
    folders = {"student": tmp_path / "run" / "student"}
    request = cost.model_request(folders, made[1].auto_class, 1, "cpu")
    metrics = lm_eval_tasks.measure_harness(settings, request, folders)["student"]
    assert metrics.keys() == {
        f"{task} {metric}"
        for task in ("arc_easy", "mine")
        for metric in ("acc", "exact_match (strict)", "limit")
    }
    value, low, high = metrics["mine acc"]
    assert (value, low, high) == pytest.approx((0.2, 0.2 - 1.96 * 0.05, 0.2 + 1.96 * 0.05), 1e-3)
    assert metrics["arc_easy exact_match (strict)"].value == 0.5
    assert math.isnan(metrics["arc_easy exact_match (strict)"].low)
    assert metrics["mine limit"].value == 3


LOCAL_TASK = """
task: birds
dataset_path: json
dataset_kwargs: {data_files: {test: birds.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.long
def test_lm_eval_measures_a_task_of_a_folder(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "birds.yaml").write_text(LOCAL_TASK)
    lines = [
        json.dumps({"question": text, "choices": ["bird", "red ball"], "answer": place % 2})
        for place, text in enumerate(tiny_runs.TEXTS)
    ]
    (tmp_path / "birds.jsonl").write_text("\n".join(lines))
    made = prepared(tmp_path / "run")
    settings = config.Evaluate(harness=["birds"], harness_path=str(tmp_path), batch_size=4)
    check_settings(settings, made[1])
    folders = {name: tmp_path / "run" / name for name in ("teacher", "student")}
    request = cost.model_request(folders, made[1].auto_class, 1, "cpu")
    metrics = lm_eval_tasks.measure_harness(settings, request, folders)
    assert metrics["teacher"] == metrics["student"]
    assert 0 <= metrics["student"]["birds acc"].value <= 1
