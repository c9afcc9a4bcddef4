"""Distillation from Python: what the README shows, and what is refused."""

import json

import lightning as L
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, PreTrainedModel

from distill import corpora, models
from distill.api import distill_model
from distill.callbacks import PruneWeights
from distill.data import batch_from_columns
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe.config import Loss, Optimizer
from distill.tasks import Labels, SingleLabelClassification
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, TINY, Rows, world

TASK = {"_target_": "distill.tasks.SingleLabelClassification", "max_length": 24}
SHORT = {key: TINY[key] for key in ("optimizer", "trainer", "tracking", "evaluate", "export")}


@pytest.fixture(scope="module")
def made(_module_store):
    return world()


@pytest.fixture
def in_memory(made, monkeypatch):
    """A teacher, its tokenizer and a dataset, and the folder in which the user works."""
    monkeypatch.setattr("distill.isolated.run_isolated", run_here)
    return made.model(), made.tokenizer, corpora.generated()


def test_models_and_data_in_memory_are_distilled_and_exported(in_memory, tmp_path):
    teacher, tokenizer, dataset = in_memory
    # README: from here
    result = distill_model(
        student={"layers": [0, 2]},
        teacher=teacher,
        tokenizer=tokenizer,
        dataset=dataset,
        folder=tmp_path / "run",
        task={"_target_": "distill.tasks.SingleLabelClassification", "max_length": 24},
        **SHORT,
    )
    folder = result.export(format="packed", quantize="weights", bits=4)
    # README: to here
    assert isinstance(result.student, PreTrainedModel) and not result.student.training
    assert result.student.config.num_hidden_layers == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["student"]
    assert json.loads((folder / "proof.json").read_text())["format"] == "packed"


def test_a_student_in_memory_is_trained_as_one_that_is_named(in_memory, made, tmp_path):
    teacher, tokenizer, dataset = in_memory
    student = made.model("student", seed=3, num_hidden_layers=1)
    models.save(student, tokenizer, tmp_path / "named")
    before = models.fingerprint(student)
    results = [
        distill_model(
            model, teacher, tokenizer, dataset, tmp_path / str(number), task=TASK, **SHORT
        )
        for number, model in enumerate([student, {"model": str(tmp_path / "named")}])
    ]
    first, second = (models.fingerprint(result.student) for result in results)
    assert first == second != before == models.fingerprint(student)


def test_the_same_call_resumes_and_another_student_is_refused(in_memory, made, tmp_path):
    teacher, tokenizer, dataset = in_memory
    student, other = (made.model("student", seed=seed, num_hidden_layers=1) for seed in (3, 4))

    def run(model, **changes):
        recipe = SHORT | changes
        return distill_model(model, teacher, tokenizer, dataset, tmp_path, task=TASK, **recipe)

    run(student)
    trained = (tmp_path / "student" / "model.safetensors").stat().st_ino
    run(student, evaluate=SHORT["evaluate"] | {"bootstrap": 30})
    assert (tmp_path / "student" / "model.safetensors").stat().st_ino == trained
    assert json.loads((tmp_path / "metrics.json").read_text())["resamples"] == 30
    with pytest.raises(UserError, match=r"student\.model was .* and is "):
        run(other)


def test_labels_that_differ_are_refused_as_those_of_named_models(in_memory, made, tmp_path):
    teacher, tokenizer, dataset = in_memory
    teacher.config.id2label = dict(enumerate(["cooking", "gardening", "sailing", "music"]))
    with pytest.raises(UserError, match="the teacher's label 2 is sailing, but .* is music"):
        distill_model({"layers": [0]}, teacher, tokenizer, dataset, tmp_path, task=TASK, **SHORT)


WITHOUT_LABELS = DatasetDict(
    {name: Dataset.from_dict({"words": ["a", "b"]}) for name in ("train", "validation", "test")}
)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"dataset": [1, 2]}, "dataset", "list"),
        ({"teacher": torch.nn.Linear(1, 1)}, "teacher", "Linear"),
        ({"student": "bert"}, "student", "str"),
        ({"tokenizer": "bert"}, "tokenizer", "str"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr", "lr"),
        ({"trainer": {"devices": 2}}, "trainer.devices", "2"),
        ({"task": {"_target_": "distill.tasks.Clasification"}}, "task", "Clasification"),
        ({"dataset": WITHOUT_LABELS}, "data.label", "words"),
    ],
    ids=["dataset", "teacher", "student", "tokenizer", "typo", "devices", "class", "column"],
)
def test_what_does_not_fit_is_one_sentence(in_memory, tmp_path, change, key, value):
    teacher, tokenizer, dataset = in_memory
    given = {"student": {"layers": [0]}, "teacher": teacher, "tokenizer": tokenizer}
    given |= {"dataset": dataset, "folder": tmp_path, "task": TASK} | SHORT | change
    with pytest.raises(UserError) as error:
        distill_model(**given)
    assert key in str(error.value) and value in str(error.value) and "\n" not in str(error.value)


# ---- a plain Trainer


@pytest.fixture
def encoded(made):
    """What a user's own preprocessing gives: input_ids, attention_mask, label."""

    def encode(examples):
        return made.tokenizer(examples["text"], truncation=True, max_length=24)

    dataset = corpora.generated().map(encode, batched=True).remove_columns("text")
    names = dataset["train"].features["label"].names
    return dataset, names


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about settings of the user's Trainer
def test_a_plain_trainer_distills_and_prunes(made, encoded, tmp_path):
    dataset, names = encoded
    student, teacher, tokenizer = made.model("student", seed=1), made.model(), made.tokenizer
    options = {"accelerator": "cpu", "logger": Rows(), "enable_progress_bar": False}
    # README: from here
    task = SingleLabelClassification(max_length=24).with_labels(Labels(tuple(names)))
    collate = DataCollatorWithPadding(tokenizer)
    module = Distillation(task, student, teacher, Loss(alpha=0.3), Optimizer(lr=1e-3))
    trainer = L.Trainer(
        max_epochs=1, callbacks=[PruneWeights(sparsity=0.5, end=0.8)], default_root_dir=tmp_path,
        **options,
    )  # fmt: skip
    trainer.fit(
        module,
        DataLoader(dataset["train"], batch_size=16, shuffle=True, collate_fn=collate),
        DataLoader(dataset["validation"], batch_size=32, collate_fn=collate),
    )
    student.save_pretrained(tmp_path / "pruned")
    # README: to here
    assert trainer.global_step == module.steps == 30
    assert 0 < float(trainer.callback_metrics["val/accuracy"]) <= 1
    weight = student.bert.encoder.layer[0].output.dense.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert {"train/loss", "train/divergence"} <= {*options["logger"].rows[-2]}


def test_a_user_s_batches_are_those_of_the_task(made, encoded):
    """Loss and gradient, however the batch was padded and whoever divides by accumulation."""
    dataset, names = encoded
    task = SingleLabelClassification(max_length=24).with_labels(Labels(tuple(names)))
    module = Distillation(task, made.model("student", seed=1), made.model()).eval()
    rows = [dataset["train"][row] for row in range(8)]
    order = [made.examples["train"][row]["input_ids"] for row in range(8)]
    assert [row["input_ids"] for row in rows] == order
    ours = task.collate([made.examples["train"][row] for row in range(8)], made.pad_id)
    for side in ("left", "right"):
        made.tokenizer.padding_side = side
        columns = DataCollatorWithPadding(made.tokenizer)(rows)
        module._trainer = L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)
        theirs = module.on_before_batch_transfer(columns, 0)
        assert theirs.rows == 2 * ours.rows == 16
        for name, tensor in ours.inputs.items():
            assert torch.equal(theirs.inputs[name], tensor)
        assert torch.equal(theirs.labels, ours.labels)


def test_a_language_model_s_batches_shift_as_the_task_does():
    made = world(**LANGUAGE)
    rows = [{"input_ids": made.examples["train"][row]["input_ids"]} for row in range(4)]
    made.tokenizer.pad_token = made.tokenizer.pad_token or made.tokenizer.eos_token
    columns = DataCollatorForLanguageModeling(made.tokenizer, mlm=False)(rows)
    batch = batch_from_columns(columns, made.task, made.pad_id)
    ours = made.task.collate([made.examples["train"][row] for row in range(4)], made.pad_id)
    assert torch.equal(batch.labels, ours.labels)
    assert torch.equal(batch.positions, ours.positions)


@pytest.mark.parametrize(
    ("batch", "words"), [([1, 2], "list"), ({"input_ids": torch.ones(1, 2)}, "labels")]
)
def test_batches_that_lack_something_are_refused(made, batch, words):
    module = Distillation(made.task, made.model("student"), made.model())
    with pytest.raises(UserError, match=words):
        module.on_before_batch_transfer(batch, 0)


def test_a_loss_that_needs_a_teacher_says_so(made):
    module = Distillation(made.task, made.model("student"))
    with pytest.raises(UserError, match="teacher is None"):
        module.parts(next(iter(made.loader())))
