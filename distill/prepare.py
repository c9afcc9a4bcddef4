"""The data of a run: bound task, tokenizers, raw and encoded examples."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from distill import data, models
from distill.data import token_spans
from distill.errors import UserError
from distill.recipe import config
from distill.tasks.base import Task, build_task
from distill.tasks.labels import shorten

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
COMPARED = 200  # examples from which a property of all is concluded


@dataclass(frozen=True)
class TeacherEncoding:
    """The examples as a teacher with another tokenizer reads them, in the same order."""

    tokenizer: PreTrainedTokenizerBase
    examples: DatasetDict


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for training and evaluation."""

    task: Task  # bound to the labels of the data
    tokenizer: PreTrainedTokenizerBase  # the student's
    raw: DatasetDict  # train, validation and test: text columns, and labels by name
    examples: DatasetDict  # encoded splits, with the columns of `Task.encode`
    teacher: TeacherEncoding | None = None  # None: the teacher reads what the student reads
    stream: data.Stream | None = None  # the training split, whose first rows are in `raw`
    class_weights: list[float] | None = None  # `loss.class_weights` in the order of the labels

    def for_teacher(self) -> Self:
        """The same data as the teacher reads them."""
        if self.teacher is None:
            return self
        encoding = self.teacher
        return replace(self, tokenizer=encoding.tokenizer, examples=encoding.examples, teacher=None)

    def with_train_columns(self, columns: Dataset) -> Self:
        """The same data with columns beside those of the training split."""
        return self.with_train(concatenate_datasets([self.examples["train"], columns], axis=1))

    def with_train(self, train: Dataset) -> Self:
        """The same data with another training split."""
        return replace(self, examples=DatasetDict({**self.examples, "train": train}))


def end_of_replies(prepared: Prepared) -> int | None:
    """The special token with which a language model's training texts end, if most do."""
    if not prepared.task.predicts_tokens:
        return None
    train = prepared.examples["train"]
    labels = train.select(range(min(COMPARED, len(train))))["labels"]
    return models.end_of_replies(labels[:], prepared.tokenizer)


def prepare_run(run: config.Run) -> Prepared:
    """Load the data of a recipe, load or train its tokenizers, and encode all splits.

    Raises:
        UserError: The data do not fit the recipe, or two models that must share a vocabulary
            do not.
    """
    _check_models(run.teacher, run.student)
    task = build_task(run.task)
    _check_generates(run.loss, run.teacher, task)
    named = {
        "tokenizer": run.tokenizer.model,
        "teacher": run.teacher.model if run.teacher else None,
        "student": run.student.model,
    }
    fine_tuned = run.teacher is not None and run.teacher.finetune is not None
    stream = _stream(run.data, task, run.seed)
    raw, task = _load(run.data, task, run.seed, None if fine_tuned else named["teacher"])
    weights = _class_weights(run.loss, raw["train"], run.data.label_column, task)
    tokenizers = models.build_tokenizers(
        run.tokenizer.vocab_size,
        named,
        task,
        task.plain_texts(data.texts(raw["train"], run.data.text)),
        shared=run.student.layers is not None,
        spans=run.loss.compares_spans,
    )
    if run.loss.compares_spans and not tokenizers.spans:
        raise UserError(
            f"loss.divergence is {run.loss.divergence}, but teacher and student have one "
            "tokenizer, so that their distributions can be compared: leave loss.divergence out"
        )
    made = _encode(task, raw, tokenizers, run.data, SPLITS)
    made = replace(made, class_weights=weights, stream=stream)
    if made.teacher is not None and run.loss.terms:
        raise UserError(
            f"loss.terms has {', '.join(run.loss.terms)}, but teacher and student have different "
            "tokenizers, and terms compare both models token by token: leave loss.terms out, or "
            "take a student with the teacher's tokenizer"
        )
    return made


def _stream(settings: config.Data, task: Task, seed: int) -> data.Stream | None:
    """The training split as a stream, if the recipe asks for one."""
    if not settings.streaming:
        return None
    if not task.predicts_tokens:
        raise UserError(
            f"data.streaming is true, but {type(task).__name__} learns from labels, which are read "
            "before training: set data.streaming=false"
        )
    stream, splits = data.open_stream(settings, seed)
    for role, name in (("validation", settings.validation), ("test", settings.test)):
        if name is None:
            log.info(
                "the %s split is %d rows at the beginning of the training split, which are "
                "not trained on",
                role,
                len(splits[role]),
            )
    return stream


def _check_generates(loss: config.Loss, teacher: config.Teacher | None, task: Task) -> None:
    """UserError if models are to write texts, but those of the task do not."""
    if task.generates:
        return
    keys = {"loss.on_policy": loss.on_policy, "teacher.writes": teacher and teacher.writes}
    for key, value in keys.items():
        if value:
            raise UserError(
                f"{key} is {str(value).lower()}, but models of {type(task).__name__} write no "
                "texts: leave it out, or take CausalLanguageModelling"
            )


def _class_weights(
    loss: config.Loss, train: Dataset, column: str | None, task: Task
) -> list[float] | None:
    """Factors of the supervised loss by class, which are logged."""
    weights = task.class_weights(
        loss.class_weights, train[column] if column in train.column_names else None
    )
    if weights is not None:
        shown = shorten(f"{name} {each:g}" for name, each in zip(task.names, weights, strict=True))
        log.info("class weights of the loss against the labels: %s", shown)
    return weights


def _check_models(*sections: config.Teacher | config.Student | None) -> None:
    """Check what names and configs of models tell by themselves, before the data are loaded."""
    for section in sections:
        role = type(section).__name__.lower()
        if section is not None and section.model is not None:
            models.check_files(section.model, f"{role}.model")
            models.check_weights(section.model, f"{role}.model")
        if section is not None and section.config is not None:
            models.check_config_keys(section.config, f"{role}.config")


def prepare(
    task: Task,
    settings: config.Data,
    seed: int,
    tokenizers: models.Tokenizers,
    splits: Collection[str] = SPLITS,
    model: str | None = None,
) -> Prepared:
    """Load the data and encode them with existing tokenizers.

    Args:
        task: The task of the recipe; a copy is bound to the labels of the data.
        settings: The recipe's section `data`.
        seed: Seed for the choice of the `data.labelled` examples that stay labelled.
        tokenizers: Encode the texts.
        splits: The splits to encode; `raw` has all of them.
        model: Folder or name of a model whose label names replace numbers.

    Raises:
        UserError: The data do not fit the recipe.
    """
    raw, task = _load(settings, task, seed, model)
    return _encode(task, raw, tokenizers, settings, splits)


def _load(
    settings: config.Data, task: Task, seed: int, model: str | None
) -> tuple[DatasetDict, Task]:
    """The raw data and the bound task; numbers for labels get the names that a model has."""
    raw, bound = data.load(settings, task, seed)
    if settings.labels is not None or model is None:
        return raw, bound
    names = models.better_names(bound.names, model)
    if not names:
        return raw, bound
    log.info(
        "the labels of the data are numbers: they get the names of %s, %s", model, ", ".join(names)
    )
    return data.load(replace(settings, labels=list(names)), task, seed)


def _encode(
    task: Task,
    raw: DatasetDict,
    tokenizers: models.Tokenizers,
    settings: config.Data,
    splits: Collection[str],
) -> Prepared:
    selected = DatasetDict({name: raw[name] for name in splits})
    student, teacher, spans = tokenizers
    for tokenizer in filter(None, (student, teacher)):
        task.prepare_tokenizer(tokenizer)
    if task.predicts_tokens:
        first = data.texts(raw["train"], settings.text[:1])
        models.check_start(student, task.plain_texts(first))
    if teacher is not None and task.predicts_tokens and not spans:
        texts = (data.texts(split, settings.text) for split in selected.values())
        written = task.plain_texts(chain.from_iterable(texts))
        models.check_unused(teacher, student, chain(task.added_texts(student), written))
        teacher = None
    made = Prepared(task, student, raw, data.encode(selected, task, student, settings))
    if teacher is None:
        return made
    encoding = TeacherEncoding(teacher, data.encode(selected, task, teacher, settings))
    if spans:
        return _with_spans(made, encoding)
    for name, split in encoding.examples.items():
        rows = (each.with_format("numpy")["rows"][:] for each in (split, made.examples[name]))
        if not np.array_equal(*rows):
            raise UserError(
                f"task.max_length is {task.max_length}, but texts of the {name} split make other "
                "examples for the teacher's tokenizer than for the student's: raise task.max_length"
            )
    return replace(made, teacher=encoding)


def _with_spans(made: Prepared, encoding: TeacherEncoding) -> Prepared:
    """The data of two language models, with the spans of the same bytes in the training split."""
    for name, split in encoding.examples.items():
        token_spans.check_windows(split, made.examples[name], name, made.task.max_length)
    if "train" not in encoding.examples:
        return replace(made, teacher=encoding)
    tables = (
        models.token_bytes(made.tokenizer, "student"),
        models.token_bytes(encoding.tokenizer, "teacher"),
    )
    pair = (made.examples["train"], encoding.examples["train"])
    student, teacher = token_spans.with_spans(pair, tables)
    examples = DatasetDict({**encoding.examples, "train": teacher})
    return replace(made.with_train(student), teacher=replace(encoding, examples=examples))
