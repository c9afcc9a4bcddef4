"""The student stage: build it, train it against the teacher, save the best weights."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback
from torch import nn
from transformers import PreTrainedModel

from distill import data, models, packing, store
from distill.callbacks import Quantize
from distill.callbacks.compression import Compression, compressions, prefix_with_key
from distill.callbacks.save_dense import SaveDense
from distill.compress.quantizer import QuantSpec
from distill.compress.restore import strip_quantization
from distill.module import Distillation
from distill.prepare import Prepared
from distill.processes import fsdp, ranks
from distill.recipe import config
from distill.tasks.base import Task
from distill.training import loop, performance
from distill.training.hardware import resolve_precision
from distill.training.loggers import Tracker

log = logging.getLogger(__name__)


def train_student(
    run: config.Run,
    prepared: Prepared,
    teacher: PreTrainedModel | None,
    callbacks: list[Callback],
    folder: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Train the student and save it as `student/` in the run folder.

    An interrupted training resumes from its newest checkpoint. If callbacks compress the student,
    `dense/` is the student before the first of them changed it.

    Args:
        run: the recipe.
        prepared: the data; its training split has the teacher's outputs unless they are online.
        teacher: result of the teacher stage.
        callbacks: Lightning callbacks, in the order in which they act.
        folder: the run folder.
        tracker: logs the training.

    Returns:
        The key `training` of metrics.json: examples, steps and the best validation metric.
    """
    # The same seed whether the teacher was trained now or by an earlier run.
    L.seed_everything(run.seed, verbose=False)
    student, classes = build_student(run.student, prepared, teacher)
    if run.student.gradient_checkpointing:
        models.set_checkpointing(student, True)
    # Saving sets it, and configs before and after saving must be equal.
    student.config.architectures = [type(student).__name__]
    task, tokenizer = prepared.task, prepared.tokenizer
    examples = examples_in_loss(prepared.examples["train"], task, run.loss)
    train, validation = loop.make_loaders(
        run,
        examples,
        prepared.examples["validation"],
        task,
        tokenizer.pad_token_id,
        prepared.for_teacher().tokenizer.pad_token_id,
    )
    packing.check_format(run.export, student, tokenizer, *quantized_tensors(student, callbacks))
    steps = loop.count_steps(run.trainer, train.plan.steps)
    online = online_part(run.teacher, run.trainer, teacher)
    loss = replace(run.loss, class_weights=prepared.class_weights)
    module = Distillation(task, student, online, loss, run.optimizer, steps)
    module.classes = classes
    _log_start(module, run.trainer, len(examples))
    techniques = compressions(callbacks)
    dense = SaveDense(techniques, steps, lambda: _save(student, tokenizer, folder / "dense"))
    online_teacher = run.teacher is not None and run.teacher.outputs == "online"
    if run.loss.needs_teacher and online_teacher and not run.trainer.compile:
        callbacks = [*callbacks, performance.OnlineTeacherCost()]
    best = loop.fit(
        loop.Training(
            module,
            train,
            validation,
            run.trainer,
            folder / "checkpoints",
            tracker.loggers("student"),
            [dense, *callbacks],
        )
    )
    for _, term in module.named_terms():
        term.detach()
    if run.student.gradient_checkpointing:
        models.set_checkpointing(student, False)
    tokenizer = _finish(techniques, dense, student, tokenizer)
    _save(student, tokenizer, folder / "student")
    ranks.barrier()
    return {"examples": len(examples), "steps": steps, "best": best}


def build_student(
    spec: config.Student, prepared: Prepared, teacher: PreTrainedModel | None
) -> tuple[PreTrainedModel, int | None]:
    """The student before training.

    Args:
        spec: the recipe's section `student`.
        prepared: the data, with the tokenizer that the student must share.
        teacher: the model whose layers may initialize the student.

    Returns:
        The student, and the number of leading logits that it shares with its teacher (None: all).
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    if spec.layers is not None and teacher is not None:
        student, report = models.select_layers(teacher, spec.layers, spec.architecture, task)
        headline, _, tensors = str(report).partition("\n")
        log.info(headline)
        log.debug(tensors)
    else:
        with ranks.rank_zero_first():  # it may have to be downloaded
            student = models.load(spec.model, spec.config, task, "student", tokenizer)
        models.check_length(student, task.max_length, "student")
        models.check_labels(student, task, "student")
        models.check_not_quantized(student, "student")
        strip_quantization(student, "student")
    if task.predicts_tokens:
        models.cut_to_vocabulary(student, tokenizer)
    if teacher is None:
        return student, None
    if spec.model is None:
        models.inherit_generation(student, teacher)
    return student, models.shared_logits(tokenizer, student, teacher)


def examples_in_loss(examples: Dataset, task: Task, loss: config.Loss) -> Dataset:
    """The examples that train the student: if the loss needs no teacher, those with a label."""
    return examples if loss.needs_teacher else data.only_labelled(examples, task)


def count_steps(
    prepared: Prepared, loss: config.Loss, trainer: config.Trainer, batch_size: int
) -> int:
    """Optimizer steps of the student's training."""
    examples = examples_in_loss(prepared.examples["train"], prepared.task, loss)
    return loop.count_steps(trainer, -(-len(examples) // batch_size))


def online_part(
    spec: config.Teacher | None, trainer: config.Trainer, teacher: PreTrainedModel | None
) -> nn.Module | None:
    """The module of the teacher that training needs: all of it if online, its head if hidden."""
    if spec is None or teacher is None:
        return None
    # The student is already built from its layers, so its dtype may change.
    teacher.to(getattr(torch, models.resolve_teacher_dtype(spec, trainer)))
    parts = {"online": teacher, "hidden": teacher.get_output_embeddings()}
    return parts.get(spec.outputs)


def _log_start(module: Distillation, trainer: config.Trainer, examples: int) -> None:
    precision = resolve_precision(trainer)
    if module.chunked and not fsdp.uses_fsdp(trainer):
        log.info("logits, their loss and gradients are computed for some rows at a time")
    log.info("training the student on %d examples, %d steps, %s", examples, module.steps, precision)


def quantized_tensors(
    student: PreTrainedModel, callbacks: list[Callback]
) -> tuple[dict[str, QuantSpec], set[str]]:
    """The tensors that the callbacks will quantize.

    Returns:
        How each tensor will be quantized, and the names of those whose layers will quantize their
        inputs dynamically.
    """
    specs: dict[str, QuantSpec] = {}
    dynamic: set[str] = set()
    for technique in (callback for callback in callbacks if isinstance(callback, Quantize)):
        with prefix_with_key(technique.name):
            weights = technique.weight_specs(student)
        specs |= weights
        dynamic |= {*weights} if technique.activations == "dynamic" else set()
    return specs, dynamic


def _finish(
    techniques: list[Compression], dense: SaveDense, student: PreTrainedModel, tokenizer: Any
) -> Any:
    """Finish the techniques after training, and return the student's tokenizer."""
    if techniques and not dense.saved:
        dense.save()
    for technique in techniques:
        tokenizer = technique.finish(student, tokenizer)
    return tokenizer


def _save(student: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    if ranks.is_rank_zero():
        with store.write_entry(folder) as inside:
            models.save(student, tokenizer, inside)
