"""A kind of task that the package does not know: training, evaluation, every export, resume."""

import importlib.util
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, List, Value
from transformers import pipeline

from distill import evaluate, export, isolated, losses, packing
from distill.evaluate.runtimes import measure_runtimes
from distill.export.command import prepared
from distill.packing import ExportSpec
from distill.recipe import config
from distill.tasks import Batch, Task, build_task, sum_per_example
from distill.tasks.base import check_max_length
from distill.tasks.collation import model_inputs, pad_column
from distill.tasks.labels import Labels
from distill.train import train
from tests.unit.tiny_runs import run_here
from tests.worlds import TINY, tiny

WORDS = {"cat": "noun", "dog": "noun", "sees": "verb", "eats": "verb", "the": "other"}


class WordTags(Task):
    """A tag for each word, at its first token: one row of logits per word."""

    auto_class = "AutoModelForTokenClassification"
    pipeline = "token-classification"
    primary_metric = "accuracy"
    maximize = True
    divergences = losses.ONE_OF_C
    label_feature = List(Value("int64"))

    def __init__(self, max_length=24):
        self.max_length = check_max_length(max_length, 3, "a word and two special tokens")

    def read_labels(self, train, data):
        return Labels(names=tuple(sorted({tag for tags in train[data.label] for tag in tags})))

    def parse_label(self, cell, declared):
        return cell

    def model_kwargs(self):
        ids = dict(enumerate(self.names))
        return {"num_labels": len(ids), "id2label": ids, "label2id": {v: k for k, v in ids.items()}}

    def encode(self, examples, tokenizer, data):
        tokens = tokenizer(
            examples[data.text[0]],
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_attention_mask=False,
        )
        labels = [
            self._token_labels(tags, tokens.word_ids(row))
            for row, tags in enumerate(examples[data.label])
        ]
        ids = tokens["input_ids"]
        return {
            "input_ids": ids,
            "labels": labels,
            "size": [1] * len(ids),
            "length": [len(row) for row in ids],
            "rows": [sum(label != losses.IGNORED for label in row) for row in labels],
            "truncated": [int(bool(encoding.overflowing)) for encoding in tokens.encodings],
        }

    def _token_labels(self, tags, words):
        earlier = [None, *words]
        return [
            losses.IGNORED if word is None or word == last else self.names.index(tags[word])
            for last, word in zip(earlier, words, strict=False)
        ]

    def collate(self, examples, pad_id):
        labels_BL = pad_column(examples, "labels", losses.IGNORED)
        positions = (labels_BL.flatten() != losses.IGNORED).nonzero()[:, 0]
        return Batch(
            inputs=model_inputs(examples, pad_id),
            labels=labels_BL.flatten()[positions],
            positions=positions,
            example=positions // labels_BL.shape[1],
            size=torch.ones(len(examples)),
            rows=len(positions),
            tokens=sum(len(example["input_ids"]) for example in examples),
        )

    def select_rows(self, logits, batch):
        return logits.flatten(0, 1)[batch.positions]

    def label_loss(self, logits_NC, labels):
        return losses.cross_entropy(logits_NC, labels)

    def outcomes(self, logits_NC, batch):
        correct_N = (logits_NC.argmax(-1) == batch.labels).float()
        return {
            "correct": sum_per_example(correct_N, batch),
            "words": sum_per_example(torch.ones_like(correct_N), batch),
        }

    def compute_metrics(self, columns):
        words = float(columns["words"].sum())
        return {"accuracy": float(columns["correct"].sum()) / words if words else math.nan}

    def agreement(self, student_NC, teacher_NC):
        return (student_NC.argmax(-1) == teacher_NC.argmax(-1)).float()


def tagged_words():
    """A source of data: sentences of known words."""
    draw = random.Random(0)
    sentences = [draw.choices([*WORDS], k=draw.randint(2, 7)) for _ in range(120)]
    rows = [
        {"text": " ".join(words), "tags": [WORDS[word] for word in words]} for words in sentences
    ]
    splits = {"train": rows[:80], "validation": rows[80:100], "test": rows[100:]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()})


TEACHER = TINY["teacher"]["config"] | {"num_hidden_layers": 12}  # a graph of the student is smaller
RECIPE = {
    "task": {"_target_": f"{__name__}.WordTags", "max_length": 24},
    "data": {"source": f"{__name__}.tagged_words", "label": "tags"},
    "teacher": {"config": TEACHER, "dtype": "float32"},
    "student": {"layers": [0, 11]},
    "export": {"format": "packed", "examples": 20},
    "trainer": {"max_steps": 8, "validations": 2, "checkpoint": {"steps": 2}},
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(isolated, "run_isolated", run_here)
    monkeypatch.chdir(tmp_path)  # programs of runtimes change the working directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a finished run, which has written its export once."""
    folder, write, written = tmp_path_factory.mktemp("run"), packing.write_format, []

    def write_and_count(*arguments):
        written.append(1)
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, "run_isolated", run_here)
        patch.setattr(packing, "write_format", write_and_count)
        train(tiny(**RECIPE), folder)
    assert len(written) == 1
    return folder


def test_it_is_trained_evaluated_and_exported(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["student"]["quality"]["accuracy"]["value"] <= 1
    assert 0 <= metrics["fidelity"]["agreement"] <= 1
    proof = json.loads((folder / "export" / "proof.json").read_text())
    assert (proof["agreement"], proof["texts"]) == (1, 20) and proof["rows"] > 20
    card = (folder / "export" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert 'pipeline("token-classification"' in card
    model = str(folder / "export")
    tag = pipeline("token-classification", model=model, trust_remote_code=True)
    assert {each["entity"] for each in tag("the cat sees")} <= {*WORDS.values()}


def installed(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="not installed")


FORMATS = [
    {"format": "dense"},
    {"format": "packed", "quantize": "static"},
    pytest.param({"format": "torchao", "quantize": "dynamic"}, marks=installed("torchao")),
    pytest.param({"format": "onnx"}, marks=[installed("onnxruntime"), pytest.mark.slow]),
    pytest.param({"format": "onnx", "quantize": "int8"}, marks=installed("onnxruntime")),
    pytest.param({"format": "openvino"}, marks=installed("openvino")),
    pytest.param({"format": "executorch"}, marks=installed("executorch")),
]


@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_every_export_is_proven(folder, settings):
    run = replace(tiny(**RECIPE), export=config.Export(**settings))
    made, earlier = (
        prepared(build_task(run.task), run.data, run.seed, folder),
        (folder / "export").stat().st_ino,
    )
    spec = ExportSpec(run.export, run.data, made.task, made.tokenizer, made.raw["train"])
    final = export.export(run, spec, made.raw["test"], folder)
    assert final.stat().st_ino != earlier
    proof = json.loads((final / "proof.json").read_text())
    assert proof["agreement"] >= 0.97 and proof["rows"] > proof["texts"] == 20
    if "quality" in proof:
        assert set(proof["quality"]["export"]) == {"accuracy"}


@pytest.mark.slow
@installed("onnxruntime")
def test_runtimes_are_measured(folder):
    run = tiny(**RECIPE)
    made = prepared(build_task(run.task), run.data, run.seed, folder)
    paths = evaluate.find_models(folder, run.teacher)
    report = measure_runtimes(run, made, paths, "test", ["torch", "onnx"])
    for name in ("torch", "onnx"):
        assert report.runtimes[name].agreement.value == 1
        assert set(report.runtimes[name].quality) == {"accuracy"}


def test_an_interrupted_training_continues_with_the_same_weights(folder, tmp_path, monkeypatch):
    original, calls = WordTags.label_loss, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(WordTags, "label_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(**RECIPE), tmp_path)
    assert not (tmp_path / "student").exists()
    train(tiny(**RECIPE), tmp_path)
    weights = Path("student", "model.safetensors")
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()
