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

from distill import data, models, packing, store, teacher_outputs
from distill.callbacks import Quantize
from distill.callbacks.compression import Compression, compressions, prefix_with_key
from distill.callbacks.save_dense import SaveDense
from distill.compress.quantizer import QuantSpec
from distill.compress.restore import strip_quantization
from distill.models import adapters
from distill.module import Distillation, resolve_divergence
from distill.prepare import Prepared, end_of_replies
from distill.processes import fsdp, ranks
from distill.recipe import config
from distill.tasks.base import Task
from distill.training import loop, on_policy, performance
from distill.training.adapter import attach_adapter, merge_adapter
from distill.training.batching import evaluation_batching, training_batching
from distill.training.hardware import resolve_precision
from distill.training.loggers import Tracker
from distill.training.served_writer import write_by_server

log = logging.getLogger(__name__)

EXAMPLES_COMPARED = 8  # on which a quantized teacher is compared with the plain one


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
    shared = run.teacher is not None and run.teacher.outputs == "base"
    student, classes = build_student(run.student, prepared, teacher, shared)
    if run.student.gradient_checkpointing:
        models.set_checkpointing(student, True)
    # Saving sets it, and configs before and after saving must be equal.
    student.config.architectures = [type(student).__name__]
    task, tokenizer = prepared.task, prepared.tokenizer
    examples = examples_in_loss(prepared.examples["train"], task, run.loss)
    train: data.Loader | data.StreamLoader
    if prepared.stream is None:
        train, validation = loop.make_loaders(
            run,
            examples,
            prepared.examples["validation"],
            task,
            tokenizer.pad_token_id,
            prepared.for_teacher().tokenizer.pad_token_id,
        )
    else:
        train = _stream_loader(run.data, run.trainer, prepared, run.seed)
        evaluated = evaluation_batching(run.evaluate.batch_size, run.trainer)
        split = prepared.examples["validation"]
        validation = data.make_loader(split, task, tokenizer.pad_token_id, evaluated)
    packing.check_format(run.export, student, tokenizer, *quantized_tensors(student, callbacks))
    if run.student.lora is not None:
        attach_adapter(student, run.student.lora, run.trainer, shared)
    steps = loop.count_steps(run.trainer, train.plan.steps)
    online = online_part(run.teacher, run.trainer, teacher)
    if run.teacher is not None and run.teacher.quantize is not None:
        device = models.resolve_device(run.trainer)
        with models.offloaded_teacher(run.teacher, run.trainer, online):
            quantize_teacher(online, run.teacher.quantize, prepared.for_teacher(), run.loss, device)
    loss = replace(run.loss, class_weights=prepared.class_weights)
    module = Distillation(task, student, online, loss, run.optimizer, steps)
    module.classes = classes
    writer = None
    if isinstance(train, data.Loader):
        if run.loss.completions_url is not None:
            base = run.student.model
            writer = write_by_server(run.loss, student, tokenizer, base, folder, steps)
        on_policy.install(module, run.loss, train, tokenizer, run.seed, writer)
    seen = len(examples) if prepared.stream is None else steps * run.data.batch_size
    _log_start(module, run.trainer, seen)
    techniques = compressions(callbacks)
    dense = SaveDense(techniques, steps, lambda: _save(student, tokenizer, folder / "dense"))
    online_teacher = run.teacher is not None and run.teacher.outputs == "online"
    if run.loss.needs_teacher and online_teacher and not run.trainer.compile:
        callbacks = [*callbacks, performance.OnlineTeacherCost()]
    with models.offloaded_teacher(run.teacher, run.trainer, online):
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
    if writer is not None:
        writer.close()
    for _, term in module.named_terms():
        term.detach()
    if run.student.gradient_checkpointing:
        models.set_checkpointing(student, False)
    if run.student.lora is not None:
        merge_adapter(student, run.student.model, folder)
    tokenizer = _finish(techniques, dense, student, tokenizer)
    _save(student, tokenizer, folder / "student")
    ranks.barrier()
    return {"examples": seen, "steps": steps, "best": best}


def _stream_loader(
    settings: config.Data, trainer: config.Trainer, prepared: Prepared, seed: int
) -> data.StreamLoader:
    """The training batches of a stream."""
    assert prepared.stream is not None
    task, tokenizer = prepared.task, prepared.tokenizer
    batching = training_batching(settings, trainer, task.max_length, seed)
    encode = data.Encoder(task, tokenizer, settings)
    return data.make_stream_loader(
        prepared.stream,
        encode,
        tokenizer.pad_token_id,
        batching,
        settings.workers,
    )


def build_student(
    spec: config.Student,
    prepared: Prepared,
    teacher: PreTrainedModel | None,
    shared: bool = False,
) -> tuple[PreTrainedModel, int | None]:
    """The student before training.

    Args:
        spec: the recipe's section `student`.
        prepared: the data, with the tokenizer that the student must share.
        teacher: the model whose layers may initialize the student.
        shared: whether the teacher itself becomes the student, for an adapter beside its weights.

    Returns:
        The student, and the number of leading logits that it shares with its teacher (None: all).
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    if shared and teacher is not None:
        student = teacher
    elif spec.layers is not None and teacher is not None:
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
    if task.predicts_tokens and spec.lora is None:  # an adapter fits the model as it was published
        models.cut_to_vocabulary(student, tokenizer)
    other_tokens = task.predicts_tokens and prepared.teacher is not None
    if teacher is not None and spec.model is None and not other_tokens:
        models.inherit_generation(student, teacher)
    models.stop_at(student, end_of_replies(prepared), tokenizer)
    if teacher is None or other_tokens:
        widest = None if spec.lora is None else models.shared_logits(tokenizer, student, student)
        return student, widest
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
    if spec.outputs == "base":
        return adapters.BaseTeacher()
    # The student is already built from its layers, so its dtype may change.
    teacher.to(getattr(torch, models.resolve_teacher_dtype(spec, trainer)))
    parts = {"online": teacher, "hidden": teacher.get_output_embeddings()}
    return parts.get(spec.outputs)


def quantize_teacher(
    teacher: Any, mode: str, prepared: Prepared, loss: config.Loss, device: str
) -> None:
    """Store the weights of an online teacher in fewer bits; log what that changes."""
    task, splits = prepared.task, prepared.examples
    examples = splits["train"] or splits["validation"]  # a stream has no training split
    some = examples.select(range(min(EXAMPLES_COMPARED, len(examples))))
    batches = data.make_loader(some, task, prepared.tokenizer.pad_token_id, data.Batching(1))
    if loss.compares_spans:  # both have the same tokens here
        loss = replace(loss, divergence=None)
    divergence = resolve_divergence(task, loss)
    with models.on_device(device, teacher):
        teacher_outputs.quantize_teacher(
            teacher,
            mode,
            task,
            batches,
            lambda quantized_NC, plain_NC: divergence(quantized_NC, plain_NC, loss.temperature),
        )


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
