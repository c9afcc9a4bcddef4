"""The teacher stage: load, fine-tune if the recipe has `finetune`, freeze, cache outputs."""

import copy
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedModel

from distill import data, models, store, teacher_outputs
from distill.compress.restore import strip_quantization
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
        prepared: the data, with the tokenizer that the teacher must share.
        folder: the run folder; a random or fine-tuned teacher is saved in it.
        tracker: logs the fine-tuning.

    Returns:
        The teacher in float32 on the CPU, None if the recipe has none.
    """
    if run.teacher is None:
        return None
    task, tokenizer, spec = prepared.task, prepared.tokenizer, run.teacher
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
    train, validation = loop.make_loaders(
        run,
        examples["train"],
        examples["validation"],
        prepared.task,
        prepared.tokenizer.pad_token_id,
    )
    steps = loop.count_steps(run.trainer, train.plan.steps, settings.epochs)
    optimizer = replace(run.optimizer, lr=settings.lr)
    log.info(
        "fine-tuning the teacher on %d examples, %d steps, %s",
        len(examples["train"]),
        steps,
        resolve_precision(run.trainer),
    )
    return loop.Training(
        Distillation(prepared.task, teacher, None, config.Loss(alpha=1.0), optimizer, steps),
        train,
        validation,
        replace(run.trainer, compile=False),
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
    return {
        "weights": models.fingerprint(teacher),
        "made by": _made_by(task),
        "examples": [data.fingerprint(labeled["train"]), data.fingerprint(labeled["validation"])],
        "epochs": finetuning.epochs,
        "optimizer": asdict(replace(run.optimizer, lr=finetuning.lr)),
        "trainer": [
            resolve_precision(settings),
            settings.accelerator,
            settings.accumulate,
            settings.validations,
            settings.patience,
        ],
        "batches": [run.data.batch_size, run.data.group_by_length],
        "seed": run.seed,
    }


def _made_by(task: Task) -> list[Any]:
    """What determines a stored result besides weights and data."""
    return [VERSION, *task.identity()]


# ---- outputs


def in_dtype(teacher: PreTrainedModel, name: str, copies: bool) -> PreTrainedModel:
    """Convert the teacher to another dtype.

    Args:
        teacher: changed in place if it is not copied.
        name: name of the dtype, such as bfloat16.
        copies: whether a teacher in another dtype is copied.
    """
    dtype = getattr(torch, name)
    if copies and dtype != teacher.dtype:
        teacher = copy.deepcopy(teacher)
    return teacher.to(dtype)


def with_outputs(run: config.Run, prepared: Prepared, teacher: PreTrainedModel | None) -> Prepared:
    """The data with the teacher's outputs as columns of the training split.

    They are computed now, or loaded from an earlier run. The data is returned unchanged if the
    teacher is online, or if the loss does not need it.
    """
    if teacher is None or run.teacher is None or not run.loss.needs_teacher:
        return prepared
    if run.teacher.outputs == "online":
        return prepared
    task, examples = prepared.task, prepared.examples["train"]
    dtype = models.resolve_teacher_dtype(run.teacher, run.trainer)
    teacher = in_dtype(teacher, dtype, copies=run.student.layers is not None)
    outputs = teacher_outputs.build_outputs(
        run.teacher,
        teacher,
        task,
        run.loss.temperature,
        models.vocabulary_size(prepared.tokenizer),
        run.seed,
    )
    device = models.resolve_device(run.trainer)
    ingredients = {
        "weights": models.fingerprint(outputs.teacher),  # which covers its dtype
        "inputs": data.fingerprint(examples),  # which covers tokenizer and encoding
        "made by": _made_by(task),
        "device": device,
    } | ({"outputs": outputs.identity} if outputs.identity else {})
    entry = store.entry_path("outputs", ingredients)
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the teacher's outputs of an earlier run with the same ingredients are used again")
    else:
        output_cache.check_disk_space(outputs, run.teacher.outputs, examples)
        log.info("computing the teacher's outputs for %d examples, in %s", len(examples), dtype)
        sharded, progress = fsdp.uses_fsdp(run.trainer), run.trainer.progress
        forward = output_cache.Forward(device, run.evaluate.batch_size, sharded, progress)
        pad_id = prepared.tokenizer.pad_token_id
        output_cache.write_outputs(entry, outputs, examples, pad_id, forward)
    columns = Dataset.from_file(str(entry / output_cache.OUTPUTS_FILE))
    train = concatenate_datasets([examples, columns], axis=1)
    return replace(prepared, examples=DatasetDict({**prepared.examples, "train": train}))
