"""Complete runs in this process: every kind of task, loss and student, up to the export."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from distill import isolated, models
from distill.errors import UserError
from distill.recipe import compose, config
from distill.train import train
from tests.grids import sampled
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, TINY, tiny, world


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """Run isolated scripts in this process; test_isolated and test_command_line start real ones."""
    monkeypatch.setattr(isolated, "run_isolated", run_here)


def rows(task, count=60):
    """Texts whose first word decides their label, of the kind that the task needs."""
    label = {
        "SingleLabelClassification": lambda number: ["no", "yes"][number % 2],
        "MultiLabelClassification": lambda number: [["small"], ["odd"], ["small", "odd"]][
            number % 3
        ],
        "Regression": lambda number: float(number % 5),
    }[task]
    return [
        {"text": f"{'abcde'[number % 5]} text of the number {number}", "label": label(number)}
        for number in range(count)
    ]


TASKS = ["SingleLabelClassification", "MultiLabelClassification", "Regression"]
RELATIONS = {
    "_target_": "distill.terms.AttentionRelations",
    "weight": 1.0,
    "student_layer": 1,
    "teacher_layer": 2,
    "heads": 4,
}
KINDS = {
    "cached": {},
    "online": {"teacher": {"outputs": "online"}},
    "few labels": {"data": {"labelled": 20}},
    "labels alone": {"loss": {"alpha": 1.0}},
    "no teacher": {
        "teacher": None,
        "loss": {"alpha": 1.0},
        "student": {"layers": None, "config": TINY["teacher"]["config"]},
    },
    "fine-tuned teacher": {"teacher": {"finetune": {"epochs": 0.1, "lr": 1e-3}}},
    "bf16 teacher": {"teacher": {"dtype": "bfloat16"}},
    "distilbert student": {"student": {"architecture": "distilbert"}},
    "hidden states": {
        "teacher": {"outputs": "online"},
        "loss": {
            "terms": {
                "hidden": {
                    "_target_": "distill.terms.HiddenStates",
                    "weight": 1.0,
                    "layers": {0: 0, 1: 2},
                }
            }
        },
    },
    "relations": {"teacher": {"outputs": "online"}, "loss": {"terms": {"last": RELATIONS}}},
    "accumulation": {"trainer": {"accumulate": 4}},
    "language model": LANGUAGE,
    "callback": {
        "callbacks": {
            "stop": {"_target_": "lightning.pytorch.callbacks.Timer", "duration": "00:01:00:00"}
        }
    },
}


OFTEN = ["no teacher", "hidden states", "language model"]


@pytest.mark.parametrize("kind", sampled(KINDS, every=3, always=OFTEN, rest="slow"))
def test_every_kind_of_run_ends_with_a_proven_student(kind, tmp_path):
    run = tiny(**KINDS[kind])
    metrics = train(run, tmp_path)
    assert metrics["examples"] > 0
    assert ("teacher" in metrics) == (run.teacher is not None)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert set(written["stages"]) == {"data", "teacher", "cache", "student", "evaluate", "export"}
    proof = json.loads((tmp_path / "export" / "proof.json").read_text())
    assert proof["agreement"] == 1
    assert_plain(tmp_path, run)


def assert_plain(folder: Path, run: config.Run) -> None:
    """Plain transformers loads the export, which holds the student's tensors and no other."""
    kind = (
        AutoModelForCausalLM
        if "Language" in run.task["_target_"]
        else AutoModelForSequenceClassification
    )
    exported, info = kind.from_pretrained(folder / "export", output_loading_info=True)
    student = kind.from_pretrained(folder / "student")
    assert not info["unexpected_keys"] and not info["missing_keys"]
    for name, tensor in student.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    AutoTokenizer.from_pretrained(folder / "export")


FILES = itertools.product(["csv", "jsonl", "parquet"], TASKS)


@pytest.mark.parametrize(("suffix", "task"), sampled(FILES, rest="slow"))  # each once
def test_a_user_s_own_files_take_the_place_of_a_hub_name(task, suffix, tmp_path):
    examples = Dataset.from_list(rows(task))
    if suffix == "csv":
        if task == "MultiLabelClassification":
            pytest.skip("a CSV cell holds no list")
        examples.to_csv(tmp_path / "mine.csv")
    else:
        getattr(examples, {"jsonl": "to_json", "parquet": "to_parquet"}[suffix])(
            tmp_path / f"mine.{suffix}"
        )
    held_out = {
        "source": str(tmp_path / f"mine.{suffix}"),
        "validation": None,
        "test": None,
        "holdout": 0.2,
    }
    run = tiny(task={"_target_": f"distill.tasks.{task}", "max_length": 16}, data=held_out)
    metrics = train(run, tmp_path / "run")
    assert metrics["examples"] == 12
    assert metrics["training"]["examples"] == 36


def test_local_folders_take_the_place_of_hub_names(tmp_path):
    made = world()
    for name, layers in (("teacher", 3), ("student", 1)):
        models.save(made.model(num_hidden_layers=layers), made.tokenizer, tmp_path / name)
    named = {
        "teacher": {"model": str(tmp_path / "teacher"), "config": None},
        "student": {"model": str(tmp_path / "student"), "layers": None},
        "tokenizer": None,
    }
    metrics = train(tiny(**named), tmp_path / "run")
    assert metrics["comparison"]["metric"] == "accuracy"
    assert not (tmp_path / "run" / "teacher").exists()  # it is where it was


def test_the_saved_recipe_gives_the_same_weights_again(tmp_path, monkeypatch):
    """Also where nothing of the first run can be used again: its teacher is trained anew."""
    run = tiny(teacher={"finetune": {"epochs": 0.2, "lr": 1e-3}}, export={"format": None})
    train(run, tmp_path / "first")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "empty"))
    train(compose.load_recipe(str(tmp_path / "first" / "recipe.yaml")), tmp_path / "again")
    first, again = (
        (tmp_path / name / "student" / "model.safetensors").read_bytes()
        for name in ("first", "again")
    )
    assert first == again


def test_a_student_that_is_not_smaller_is_exported_only_if_that_is_allowed(tmp_path):
    run = tiny(student={"layers": [0, 1, 2]})
    with pytest.raises(UserError, match=r"export\.smaller is true"):
        train(run, tmp_path / "refused")
    assert not (tmp_path / "refused" / "teacher").exists()
    run.export.smaller = False
    train(run, tmp_path / "allowed")
    assert (tmp_path / "allowed" / "export" / "model.safetensors").is_file()


def test_the_learning_curve_is_logged_step_by_step(tmp_path):
    train(tiny(trainer={"max_steps": 20}, export={"format": None}), tmp_path)
    with (tmp_path / "logs" / "student" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = [int(line["step"]) for line in lines if line["train/loss"]]
    assert steps == sorted(set(steps))
    assert any(line["val/accuracy"] for line in lines)


WITH_DATA_AND_MODELS = [
    (["student.layers=[0,9]"], ["student.layers has 9", "0 to 2"]),
    (["student.architecture=gpt2"], ["student.architecture is gpt2", "bert or distilbert"]),
    (
        ["teacher.config=null", "teacher.model=no/such-model", "tokenizer.vocab_size=null"],
        ["no/such-model", "local folder"],
    ),
    (["data.source=missing.csv"], ["missing.csv", "no such file"]),
    (["data.text=[body]"], ["data.text is body", "text, label"]),
    (["data.labelled=100000"], ["data.labelled is 100000"]),
    (["teacher.config.max_position_embeddings=20"], ["task.max_length is 24", "20 positions"]),
    (["trainer.accumulate=99"], ["trainer.accumulate is 99"]),
    (["loss.divergence=sigmoid_kl"], ["sigmoid_kl", "forward_kl"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WITH_DATA_AND_MODELS, ids=lambda value: " ".join(value)
)
def test_what_only_data_and_models_can_tell_is_one_sentence(arguments, words, tmp_path):
    composed = OmegaConf.merge(
        OmegaConf.structured(config.Run), TINY, OmegaConf.from_dotlist(arguments)
    )
    with pytest.raises(UserError) as refused:
        train(compose.validate(composed), tmp_path)
    assert all(word in str(refused.value) for word in words), str(refused.value)
