"""The teacher stage: load, fine-tune if the recipe has `finetune`, freeze, cache outputs."""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from datasets import Dataset, DatasetDict
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel

from distill import data, models, served, store, teacher_outputs
from distill.compress.restore import strip_quantization
from distill.data import teacher_columns
from distill.module import Distillation
from distill.prepare import Prepared
from distill.processes import fsdp, ranks
from distill.recipe import config
from distill.tasks.base import Task
from distill.teacher_outputs import output_cache
from distill.training import loop
from distill.training.hardware import resolve_precision
from distill.training.loggers import Tracker

log = logging.getLogger(__name__)

# Version of stored teachers and outputs: raise it when training or losses change.
VERSION = 3


def obtain(
    run: config.Run, prepared: Prepared, folder: Path, tracker: Tracker
) -> PreTrainedModel | None:
    """The frozen teacher: pretrained, or fine-tuned on the labeled examples.

    A fine-tuned teacher of an earlier run is reused if its ingredients are the same.

    Args:
        run: its sections `teacher`, `trainer`, `optimizer` and `data`.
        prepared: the data, with the tokenizers of both models.
        folder: the run folder; a random or fine-tuned teacher is saved in it.
        tracker: logs the fine-tuning.

    Returns:
        The teacher in float32 on the CPU, None if the recipe has none or it is served.
    """
    if (spec := run.local_teacher) is None:
        return None
    prepared = prepared.for_teacher()
    task, tokenizer = prepared.task, prepared.tokenizer
    teacher_outputs.check_outputs(spec, task)
    L.seed_everything(run.seed, verbose=False)
    frozen = spec.finetune is None and spec.model is not None
    with ranks.rank_zero_first():  # it may have to be downloaded
        teacher = models.load(spec.model, spec.config, task, "teacher", tokenizer, strict=frozen)
    models.check_length(teacher, task.max_length, "teacher")
    models.check_not_quantized(teacher, "teacher")
    if spec.finetune is not None:
        strip_quantization(teacher, "teacher")
        models.set_labels(teacher, task)
        teacher = finetune(run, prepared, teacher, folder, tracker)
    else:
        models.check_labels(teacher, task, "teacher")
        if spec.model is None and ranks.is_rank_zero():
            models.save(teacher, tokenizer, folder / "teacher")
    return teacher.eval().requires_grad_(False)


# ---- fine-tuning


def finetune(
    run: config.Run, prepared: Prepared, teacher: PreTrainedModel, folder: Path, tracker: Tracker
) -> PreTrainedModel:
    """Fine-tune a teacher, or load the one of an earlier run with the same ingredients.

    It is saved in the store and in the run folder.
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    labeled = DatasetDict(
        train=data.only_labelled(prepared.examples["train"], task),
        validation=prepared.examples["validation"],
    )
    entry = store.entry_path("teachers", _ingredients(run, task, labeled, teacher))
    checkpoints = folder / "checkpoints" / "teacher"
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the fine-tuned teacher of an earlier run with the same ingredients is used again")
    else:
        loop.fit(_training(run, replace(prepared, examples=labeled), teacher, checkpoints, tracker))
        if ranks.is_rank_zero():
            with store.write_entry(entry) as inside:
                models.save(teacher, tokenizer, inside)
    if ranks.is_rank_zero():
        store.link_tree(entry, folder / "teacher")
        shutil.rmtree(checkpoints, ignore_errors=True)  # the result is stored
    ranks.barrier()
    return models.load(str(entry), None, task, "teacher", tokenizer, strict=True)


def _training(
    run: config.Run, prepared: Prepared, teacher: PreTrainedModel, folder: Path, tracker: Tracker
) -> loop.Training:
    """A training on labels only, with the length and learning rate of `teacher.finetune`."""
    assert run.teacher is not None and run.teacher.finetune is not None
    settings, examples = run.teacher.finetune, prepared.examples
    run = replace(run, trainer=replace(run.trainer, compile=False))
    train, validation = loop.make_loaders(
        run,
        examples["train"],
        examples["validation"],
        prepared.task,
        prepared.tokenizer.pad_token_id,
    )
    steps = loop.count_steps(run.trainer, train.plan.steps, settings.epochs)
    optimizer = replace(run.optimizer, lr=settings.lr)
    loss = config.Loss(alpha=1.0, class_weights=prepared.class_weights)
    log.info(
        "fine-tuning the teacher on %d examples, %d steps, %s",
        len(examples["train"]),
        steps,
        resolve_precision(run.trainer),
    )
    return loop.Training(
        Distillation(prepared.task, teacher, None, loss, optimizer, steps),
        train,
        validation,
        run.trainer,
        folder,
        tracker.loggers("teacher"),
        rate_key="teacher.finetune.lr",
    )


def _ingredients(
    run: config.Run, task: Task, labeled: DatasetDict, teacher: PreTrainedModel
) -> dict[str, Any]:
    """Everything that determines the weights of a fine-tuned teacher."""
    assert run.teacher is not None and run.teacher.finetune is not None
    settings, finetuning = run.trainer, run.teacher.finetune
    optimizer = asdict(replace(run.optimizer, lr=finetuning.lr))
    later = {  # keys that were added later: without them, stored teachers are found again
        "class weights": run.loss.class_weights,
        "multiple": run.data.pad_to_multiple_of,
        "fused": optimizer.pop("fused"),
    }
    return {
        "weights": models.fingerprint(teacher),
        **models.generation_identity(teacher),
        "made by": _made_by(task),
        "examples": [data.fingerprint(labeled["train"]), data.fingerprint(labeled["validation"])],
        "epochs": finetuning.epochs,
        "optimizer": optimizer,
        "trainer": [
            resolve_precision(settings),
            settings.accelerator,
            settings.accumulate,
            settings.validations,
            settings.patience,
        ],
        "batches": [run.data.batch_size, run.data.group_by_length],
        "seed": run.seed,
    } | {name: value for name, value in later.items() if value is not None}


def _made_by(task: Task) -> list[Any]:
    """What determines a stored result besides weights and data."""
    return [VERSION, *task.identity()]


# ---- outputs


def with_outputs(run: config.Run, prepared: Prepared, teacher: PreTrainedModel | None) -> Prepared:
    """The data with the columns of the training split that the teacher needs.

    Its outputs are computed now, or loaded from an earlier run. An online teacher with another
    tokenizer gets its encoding of the texts. With `teacher.writes`, the completions are replaced by
    the teacher's. The teacher is compared with the labels.

    Raises:
        UserError: the teacher is worse than chance on them, or its classes have another order.
    """
    if teacher is None and run.teacher is not None and run.loss.needs_teacher:
        columns = served.columns_of_run(run.teacher, prepared, run.trainer.progress)
        return prepared.with_train_columns(columns)
    if teacher is None or run.teacher is None:
        return prepared
    if not (run.loss.needs_teacher or run.teacher.writes):
        return prepared
    task, device = prepared.task, models.resolve_device(run.trainer)
    dtype = models.resolve_teacher_dtype(run.teacher, run.trainer)
    teacher = models.in_dtype(teacher, dtype, copies=run.student.layers is not None)
    sharded, progress = fsdp.uses_fsdp(run.trainer), run.trainer.progress
    forward = output_cache.Forward(device, run.evaluate.batch_size, sharded, progress)
    with models.offloaded_teacher(run.teacher, run.trainer, teacher):
        if run.teacher.writes:
            writer = teacher_outputs.TeacherCompletions(
                teacher, task, prepared.tokenizer, run.loss, run.seed
            )
            prepared = prepared.with_train(writer.of_split(prepared.examples["train"], forward))
            if not run.loss.needs_teacher:
                return prepared
        reading = prepared.for_teacher()
        examples = reading.examples["train"]
        if run.teacher.outputs not in ("online", "base"):
            outputs = teacher_outputs.build_outputs(
                run.teacher,
                teacher,
                task,
                run.loss.temperature,
                models.vocabulary_size(reading.tokenizer),
                run.seed,
            )
            columns = _cached_columns(run.teacher.outputs, outputs, reading, forward)
            prepared = prepared.with_train_columns(columns)
            reading = reading.with_train_columns(columns)
        elif prepared.teacher is not None:
            prepared = prepared.with_train_columns(teacher_columns.rename_inputs(examples))
        if run.loss.alpha < 1:
            _check_labels(run.teacher, reading, teacher, forward)
    return prepared


def _cached_columns(
    name: str,
    outputs: teacher_outputs.TeacherOutputs,
    reading: Prepared,
    forward: output_cache.Forward,
) -> Dataset:
    """The teacher's outputs for the training split, computed now or by an earlier run."""
    examples = reading.examples["train"]
    ingredients = {
        "weights": models.fingerprint(outputs.teacher),  # which covers its dtype
        "inputs": data.fingerprint(examples),  # which covers tokenizer and encoding
        "made by": _made_by(reading.task),
        "device": forward.device,
    } | ({"outputs": outputs.identity} if outputs.identity else {})
    entry = store.entry_path("outputs", ingredients)
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the teacher's outputs of an earlier run with the same ingredients are used again")
    else:
        output_cache.check_disk_space(outputs.size, name, examples)
        dtype = str(outputs.teacher.dtype).removeprefix("torch.")
        log.info("computing the teacher's outputs for %d examples, in %s", len(examples), dtype)
        output_cache.write_outputs(
            entry, outputs, examples, reading.tokenizer.pad_token_id, forward
        )
    return Dataset.from_file(str(entry / output_cache.OUTPUTS_FILE))


def _check_labels(
    spec: config.Teacher, reading: Prepared, teacher: PreTrainedModel, forward: output_cache.Forward
) -> None:
    """Compare the teacher with labels of the training split, or of validation if it has none."""
    task, classes = reading.task, None
    if task.predicts_tokens:
        classes = models.vocabulary_size(reading.tokenizer)
    for name in ("train", "validation"):
        split = reading.examples[name]
        chosen = teacher_outputs.choose_examples(split, task)
        if len(chosen):
            break
    else:
        log.warning("no example has a label: the teacher cannot be compared with labels")
        return
    ids = tuple(str(place) for place in range(len(task.names)))
    origin = teacher_outputs.Origin(
        is_trained=spec.model is not None or spec.finetune is not None,
        is_fine_tuned=spec.finetune is not None,
        has_names=spec.model is not None and bool(models.better_names(ids, spec.model)),
    )
    batching = data.Batching(1 if task.predicts_tokens else forward.batch_size)
    loader = data.make_loader(split.select(chosen), task, reading.tokenizer.pad_token_id, batching)
    if teacher_columns.LOGITS in split.column_names:
        cached = lambda batch: batch.teacher[:, :classes]  # noqa: E731
        teacher_outputs.check_labels(task, loader, cached, origin)
        return
    outputs = teacher_outputs.LogitOutputs(teacher, task)
    with teacher_outputs.on_device(outputs, forward):
        device = outputs.teacher.device
        batches = (move_data_to_device(batch, device) for batch in loader)
        teacher_outputs.check_labels(
            task,
            batches,
            lambda batch: outputs.rows(batch, np.arange(0))[:, :classes],
            origin,
        )
