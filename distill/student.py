"""The student stage: build it, train it against the teacher, and save the weights that did best on the validation split."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from transformers import PreTrainedModel

from distill import config, data, fit, models, pace, packing, ranks, sharding, store, targets
from distill.callbacks import Quantize
from distill.callbacks.base import Before, Compression, arranged, compressions, named
from distill.callbacks.quantize import inputs
from distill.compress.quantize import Spec
from distill.compress.rebuild import loosened
from distill.errors import UserError
from distill.module import Distillation
from distill.tasks.base import Task
from distill.tracking import Tracker

log = logging.getLogger(__name__)


def callbacks(run: config.Run) -> list[Callback]:
    """The recipe's callbacks; UserError where they would change a student of which each process has but a share."""
    built = [_callback(name, spec) for name, spec in run.callbacks.items()]
    if run.trainer.compile and compressions(built):
        raise UserError(
            f"trainer.compile is true, but callbacks.{compressions(built)[0].name} changes the student while it trains, and it would be "
            "compiled again and again: leave trainer.compile out"
        )
    if run.trainer.strategy == "fsdp" and compressions(built):
        raise UserError(
            f"trainer.strategy is fsdp, but callbacks.{compressions(built)[0].name} changes tensors that no process has whole: "
            "set trainer.strategy=ddp, or leave it out and compress with export.quantize"
        )
    return built


def informed(run: config.Run, task: Task, tokenizer: Any, callbacks: list[Callback], raw: Dataset, examples: Dataset) -> list[Callback]:
    """The callbacks in their order, those that compress by stage, once they know data and length; UserError where they do not go together.

    `raw` and `examples` are the training split, as texts and encoded.
    """
    per_epoch = -(-len(useful(examples, task, run)) // run.data.batch_size)
    for technique in compressions(callbacks):
        with named(technique.name):
            technique.read(tokenizer, (text for column in run.data.text for text in raw[column] if text))
    return arranged(callbacks, fit.steps(run.trainer, per_epoch))


def distil(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    examples: DatasetDict,
    teacher: PreTrainedModel | None,
    callbacks: list[Callback],
    folder: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Train the recipe's student and write it to `student/` in the run folder. Returns what metrics.json says of its training.

    A training that was cut short goes on from its newest checkpoint.

    Where callbacks compress it, `dense/` holds the student as it was before the first of them changed it.
    """
    L.seed_everything(run.seed, verbose=False)  # whether the teacher was trained now or earlier must not matter
    student, classes = build(run, task, tokenizer, teacher)
    student.config.architectures = [type(student).__name__]  # as saving it does: checkpoints before and after that are alike
    learned = useful(examples["train"], task, run)
    train, validation = fit.loaders(run, learned, examples["validation"], task, tokenizer.pad_token_id)
    packing.check(run, student, tokenizer, *_quantized(student, callbacks))
    steps = fit.steps(run.trainer, train.plan.steps)
    module = Distillation(task, student, _answering(run, teacher), run.loss, run.optimizer, steps, classes)
    if module.chunked and not sharding.wanted(run.trainer) and fit.precision(run.trainer) != "16-mixed":
        log.info("logits are computed some at a time, the loss and its gradients with them")
    log.info("training the student on %d examples, %d steps, %s", len(learned), steps, fit.precision(run.trainer))
    techniques = compressions(callbacks)
    dense = Before(techniques, steps, lambda: _save(student, tokenizer, folder / "dense"))
    loggers = tracker.loggers("student")
    watching = [pace.OnlineTeacher()] if run.loss.needs_teacher and run.teacher is not None and run.teacher.outputs == "online" else []
    best = fit.fit(module, train, validation, run.trainer, folder / "checkpoints", loggers, [dense, *callbacks, *watching])
    for _, term in module.named_terms():
        term.detach()
    if techniques and not dense.saved:
        dense.save()  # what is left to do is done now
    for technique in techniques:
        tokenizer = technique.finish(student, tokenizer)
    _save(student, tokenizer, folder / "student")
    ranks.barrier()
    return {"examples": len(learned), "steps": steps, "best": best}


def _answering(run: config.Run, teacher: PreTrainedModel | None) -> nn.Module | None:
    """What of the teacher answers in training: all of it online, its head where its hidden states are cached."""
    if run.teacher is None or teacher is None:
        return None
    teacher.to(getattr(torch, models.dtype_of(run)))  # no student is cut from it any more
    return {"online": teacher, "hidden": teacher.get_output_embeddings()}.get(run.teacher.outputs)


def _quantized(student: PreTrainedModel, callbacks: list[Callback]) -> tuple[dict[str, Spec], set[str]]:
    """The tensors that the callbacks will quantize, and how; those whose layers will round their inputs to each token's range."""
    specs: dict[str, Spec] = {}
    rounded: set[str] = set()
    for technique in (each for each in callbacks if isinstance(each, Quantize)):
        with named(technique.name):
            found = {name: technique.spec(inputs(layer)) for name, layer in technique.tensors(student).items()}
        specs |= found
        rounded |= {*found} if technique.activations == "dynamic" else set()
    return specs, rounded


def _save(student: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    if ranks.is_first():
        with store.writing(folder) as inside:
            models.save(student, tokenizer, inside)


def _callback(name: str, spec: dict[str, Any]) -> Callback:
    with named(name):
        built = targets.build(spec)
    if isinstance(built, Compression):
        built.name = name
    if isinstance(built, ModelCheckpoint):
        raise UserError(f"callbacks.{name} is a ModelCheckpoint, but a run saves its own state: say when with trainer.checkpoint")
    if not isinstance(built, Callback):
        raise UserError(
            f"callbacks.{name} is {spec['_target_']}, but that gives a {type(built).__name__}, and Lightning calls only its own: "
            "name a subclass of lightning.pytorch.callbacks.Callback"
        )
    return built


def build(run: config.Run, task: Task, tokenizer: Any, teacher: PreTrainedModel | None) -> tuple[PreTrainedModel, int | None]:
    """The student before training, and how many columns of the logits it shares with its teacher (null: all)."""
    spec = run.student
    if spec.layers is not None and teacher is not None:
        student, account = models.cut(teacher, spec.layers, spec.architecture, task)
        headline, _, tensors = str(account).partition("\n")
        log.info(headline)
        log.debug(tensors)
    else:
        with ranks.first_then_others():  # it may have to be downloaded
            student = models.load(spec.model, spec.config, task, "student", tokenizer)
        models.check_length(student, task.max_length, "student")
        models.check_labels(student, task, "student")
        models.check_floats(student, "student")
        loosened(student, "student")
    existing = run.teacher is not None and run.teacher.outputs in config.SPARSE  # which know no others
    return student, models.shared_vocabulary(tokenizer, student, teacher, existing) if teacher is not None else None


def useful(examples: Dataset, task: Task, run: config.Run) -> Dataset:
    """The examples that have a part in the loss: those without a label have none where nothing comes from the teacher."""
    return examples if run.loss.needs_teacher else data.labelled_only(examples, task)
