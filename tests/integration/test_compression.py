"""Every technique: the trained student is saved and exported; it resumes; two ranks agree."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from distill import export, models, student
from distill.evaluate.cost import weight_bytes
from distill.module import Distillation
from distill.packing import ExportSpec
from distill.training import loop
from distill.training.loggers import Tracker
from tests import worlds
from tests.grids import sampled
from tests.techniques import TECHNIQUES
from tests.unit.tiny_runs import run_here
from tests.worlds import STILL, callbacks_of, world

STEPS, PER_EPOCH = 12, 4
ROWS = pytest.mark.parametrize("row", sampled(TECHNIQUES, every=5, rest="slow"))


def small():
    teacher = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        **STILL["bert"],
    }
    return world(
        teacher={"config": teacher, "outputs": "online", "dtype": "float32"},
        trainer={"max_steps": STEPS},
        data={"batch_size": 120},
    )


@pytest.fixture(scope="module")
def made(_module_store):
    return small()


def described(made, row):
    packing, callbacks = TECHNIQUES[row]
    return replace(
        made.run,
        callbacks=copy.deepcopy(callbacks),
        export=replace(made.run.export, format=packing),
    )


def prepared(made, row):
    """A module and its callbacks, ready to train."""
    run = described(made, row)
    torch.manual_seed(0)
    teacher_model = made.model()
    built, classes = student.build_student(run.student, made, teacher_model)
    module = Distillation(made.task, built, teacher_model, run.loss, run.optimizer, STEPS)
    module.classes = classes
    return module, callbacks_of(run, made)


def trainer(made, callbacks, folder, **options):
    return worlds.trainer(
        STEPS,
        *callbacks,
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=PER_EPOCH, save_top_k=-1),
        **options,
    )


def fitted(made, row, folder, resume=None):
    """The last checkpoint: weights, the states of the optimizer and of the callbacks."""
    module, callbacks = prepared(made, row)
    train, _ = loop.make_loaders(
        made.run, made.examples["train"], made.examples["validation"], made.task, made.pad_id
    )
    assert train.plan.steps == PER_EPOCH
    driver = trainer(made, callbacks, folder)
    with loop.silence_lightning():
        driver.fit(module, train, ckpt_path=resume)
    return torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)


def same(one, other):
    """Whether two nests hold the same bytes."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@ROWS
def test_a_resumed_training_ends_with_the_same_bytes(made, row, tmp_path):
    whole = fitted(made, row, tmp_path / "whole")
    for step in (PER_EPOCH, 2 * PER_EPOCH):  # while the schedules are under way, and after
        resumed = fitted(
            made, row, tmp_path / f"from {step}", resume=tmp_path / "whole" / f"step={step}.ckpt"
        )
        for part in ("state_dict", "optimizer_states", "student_config"):
            assert same(whole[part], resumed[part]), part
        ours = {
            key: state
            for key, state in whole["callbacks"].items()
            if not key.startswith("ModelCheckpoint")
        }
        assert same(ours, {key: resumed["callbacks"][key] for key in ours})


@ROWS
def test_what_is_trained_is_what_is_saved_and_exported(made, row, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.isolated.run_isolated", run_here)
    run = described(made, row)
    teacher_model = made.model()
    callbacks = callbacks_of(run, made)
    student.train_student(run, made, teacher_model, callbacks, tmp_path, Tracker(run, tmp_path))
    models.save(teacher_model, made.tokenizer, tmp_path / "teacher")
    trained = answers_of_the_best_checkpoint(made, row, tmp_path)
    tokenizer = models.load_tokenizer(str(tmp_path / "student"))
    saved = models.load(
        str(tmp_path / "student"), None, made.task, "student", tokenizer, strict=True
    )
    assert torch.equal(trained, answers(made, saved, tokenizer))
    spec = ExportSpec(run.export, run.data, made.task, tokenizer, made.raw["train"])
    folder = export.export(run, spec, made.raw["test"], tmp_path)
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["agreement"] == 1.0
    exported = models.load(str(folder), None, made.task, "student", tokenizer, strict=True)
    assert torch.equal(answers(made, saved, tokenizer), answers(made, exported, tokenizer))
    assert (
        weight_bytes(folder) < weight_bytes(tmp_path / "dense") or row == "vocabulary"
    )  # this corpus uses every token


def answers_of_the_best_checkpoint(made, row, folder):
    """Logits of the student as it was in the loop: its quantizers at work, nothing folded."""
    module, _ = prepared(made, row)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return answers(made, module.student.eval(), made.tokenizer)


@torch.inference_mode()
def answers(made, model, tokenizer):
    """Logits for the training texts, in which a trimmed vocabulary lacks nothing."""
    columns = made.task.encode(made.raw["train"][:64], tokenizer, made.run.data)
    examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return models.logits(model, made.task.collate(examples, tokenizer.pad_token_id).inputs)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Both ranks end with the same weights, masks and moments, resumed or not."""
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0].keys() > TECHNIQUES.keys()
    assert ranks[0] == ranks[1]
    for row in TECHNIQUES:
        (weights, _, moments), whole = (
            ranks[0][f"{row}, resumed"],
            ranks[0][row],
        )  # nobody remembers masks of what is cut out
        assert [weights, moments] == [whole[0], whole[2]], row
