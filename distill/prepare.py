"""The data of a run: bound task, tokenizer, raw and encoded examples."""

from collections.abc import Collection
from dataclasses import dataclass

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from distill import data, models
from distill.recipe import config, targets
from distill.tasks.base import Task

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for training and evaluation."""

    task: Task  # bound to the labels of the data
    tokenizer: PreTrainedTokenizerBase
    raw: DatasetDict  # train, validation and test: text columns, and labels by name
    examples: DatasetDict  # encoded splits, with the columns of `Task.encode`


def prepare_run(run: config.Run) -> Prepared:
    """Load the data of a recipe, load or train its tokenizer, and encode all splits.

    Raises:
        UserError: The data do not fit the recipe, or a model has another vocabulary.
    """
    raw, task = data.load(run.data, targets.instantiate(run.task), run.seed)
    named = {
        "tokenizer": run.tokenizer.model,
        "teacher": run.teacher.model if run.teacher else None,
        "student": run.student.model,
    }
    texts = data.texts(raw["train"], run.data.text)
    tokenizer = models.build_tokenizer(run.tokenizer.vocab_size, named, task, texts)
    return Prepared(task, tokenizer, raw, data.encode(raw, task, tokenizer, run.data))


def prepare(
    task: Task,
    settings: config.Data,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    splits: Collection[str] = SPLITS,
) -> Prepared:
    """Load the data and encode them with an existing tokenizer.

    Args:
        task: The task of the recipe; a copy is bound to the labels of the data.
        settings: The recipe's section `data`.
        seed: Seed for the choice of the `data.labelled` examples that stay labelled.
        tokenizer: Encodes the texts.
        splits: The splits to encode; `raw` has all of them.

    Raises:
        UserError: The data do not fit the recipe.
    """
    raw, task = data.load(settings, task, seed)
    selected = DatasetDict({name: raw[name] for name in splits})
    return Prepared(task, tokenizer, raw, data.encode(selected, task, tokenizer, settings))
