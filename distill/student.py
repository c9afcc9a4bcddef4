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

from distill import data, models, packing, store
from distill.callbacks import Quantize
from distill.callbacks.base import (
    Compression,
    SaveDense,
    compressions,
    order_callbacks,
    prefix_with_key,
)
from distill.callbacks.quantize import inputs
from distill.compress.quantizer import QuantSpec
from distill.compress.restore import strip_quantization
from distill.errors import UserError
from distill.module import Distillation
from distill.processes import fsdp, ranks
from distill.recipe import config, targets
from distill.tasks.base import Task
from distill.training import loop, performance
from distill.training.loggers import Tracker

log = logging.getLogger(__name__)


def build_callbacks(run: config.Run) -> list[Callback]:
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


def bind_callbacks(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    build_callbacks: list[Callback],
    raw: Dataset,
    examples: Dataset,
) -> list[Callback]:
    """The callbacks in their order, those that compress by stage, once they know data and length; UserError where they do not go together.

    `raw` and `examples` are the training split, as texts and encoded.
    """
    per_epoch = -(-len(examples_in_loss(examples, task, run)) // run.data.batch_size)
    for technique in compressions(build_callbacks):
        with prefix_with_key(technique.name):
            technique.bind_to_data(
                tokenizer, (text for column in run.data.text for text in raw[column] if text)
            )
    return order_callbacks(build_callbacks, loop.count_steps(run.trainer, per_epoch))


def distil(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    examples: DatasetDict,
    teacher: PreTrainedModel | None,
    build_callbacks: list[Callback],
    folder: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Train the recipe's student and write it to `student/` in the run folder. Returns what metrics.json says of its training.

    A training that was cut short goes on from its newest checkpoint.

    Where callbacks compress it, `dense/` holds the student as it was before the first of them changed it.
    """
    L.seed_everything(
        run.seed, verbose=False
    )  # whether the teacher was trained now or earlier must not matter
    student, classes = build_student(run, task, tokenizer, teacher)
    student.config.architectures = [
        type(student).__name__
    ]  # as saving it does: checkpoints before and after that are alike
    learned = examples_in_loss(examples["train"], task, run)
    train, validation = loop.make_loaders(
        run, learned, examples["validation"], task, tokenizer.pad_token_id
    )
    packing.check_format(run, student, tokenizer, *_quantized(student, build_callbacks))
    steps = loop.count_steps(run.trainer, train.plan.steps)
    module = Distillation(
        task, student, _answering(run, teacher), run.loss, run.optimizer, steps, classes
    )
    if (
        module.chunked
        and not fsdp.uses_fsdp(run.trainer)
        and loop.resolve_precision(run.trainer) != "16-mixed"
    ):
        log.info("logits are computed some at a time, the loss and its gradients with them")
    log.info(
        "training the student on %d examples, %d steps, %s",
        len(learned),
        steps,
        loop.resolve_precision(run.trainer),
    )
    techniques = compressions(build_callbacks)
    dense = SaveDense(techniques, steps, lambda: _save(student, tokenizer, folder / "dense"))
    loggers = tracker.loggers("student")
    watching = (
        [performance.OnlineTeacherCost()]
        if run.loss.needs_teacher and run.teacher is not None and run.teacher.outputs == "online"
        else []
    )
    best = loop.fit(
        module,
        train,
        validation,
        run.trainer,
        folder / "checkpoints",
        loggers,
        [dense, *build_callbacks, *watching],
    )
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
    teacher.to(
        getattr(torch, models.resolve_teacher_dtype(run))
    )  # no student is cut from it any more
    return {"online": teacher, "hidden": teacher.get_output_embeddings()}.get(run.teacher.outputs)


def _quantized(
    student: PreTrainedModel, build_callbacks: list[Callback]
) -> tuple[dict[str, QuantSpec], set[str]]:
    """The tensors that the callbacks will quantize, and how; those whose layers will round their inputs to each token's range."""
    specs: dict[str, QuantSpec] = {}
    rounded: set[str] = set()
    for technique in (each for each in build_callbacks if isinstance(each, Quantize)):
        with prefix_with_key(technique.name):
            found = {
                name: technique.spec(inputs(layer))
                for name, layer in technique.tensors(student).items()
            }
        specs |= found
        rounded |= {*found} if technique.activations == "dynamic" else set()
    return specs, rounded


def _save(student: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    if ranks.is_rank_zero():
        with store.write_entry(folder) as inside:
            models.save(student, tokenizer, inside)


def _callback(name: str, spec: dict[str, Any]) -> Callback:
    with prefix_with_key(name):
        built = targets.instantiate(spec)
    if isinstance(built, Compression):
        built.name = name
    if isinstance(built, ModelCheckpoint):
        raise UserError(
            f"callbacks.{name} is a ModelCheckpoint, but a run saves its own state: say when with trainer.checkpoint"
        )
    if not isinstance(built, Callback):
        raise UserError(
            f"callbacks.{name} is {spec['_target_']}, but that gives a {type(built).__name__}, and Lightning calls only its own: "
            "name a subclass of lightning.pytorch.callbacks.Callback"
        )
    return built


def build_student(
    run: config.Run, task: Task, tokenizer: Any, teacher: PreTrainedModel | None
) -> tuple[PreTrainedModel, int | None]:
    """The student before training, and how many columns of the logits it shares with its teacher (null: all)."""
    spec = run.student
    if spec.layers is not None and teacher is not None:
        student, account = models.select_layers(teacher, spec.layers, spec.architecture, task)
        headline, _, tensors = str(account).partition("\n")
        log.info(headline)
        log.debug(tensors)
    else:
        with ranks.rank_zero_first():  # it may have to be downloaded
            student = models.load(spec.model, spec.config, task, "student", tokenizer)
        models.check_length(student, task.max_length, "student")
        models.check_labels(student, task, "student")
        models.check_floats(student, "student")
        strip_quantization(student, "student")
    existing = (
        run.teacher is not None and run.teacher.outputs in config.SPARSE
    )  # which know no others
    return student, models.shared_logits(
        tokenizer, student, teacher, existing
    ) if teacher is not None else None


def examples_in_loss(examples: Dataset, task: Task, run: config.Run) -> Dataset:
    """The examples that have a part in the loss: those without a label have none where nothing comes from the teacher."""
    return examples if run.loss.needs_teacher else data.only_labelled(examples, task)
