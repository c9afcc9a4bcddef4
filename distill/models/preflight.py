"""What must agree before two models may learn from each other: labels, token ids, lengths; and the fingerprint of a model."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.tasks.base import Task

INCIDENTAL = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
)  # keys of a config that change no answer
log = logging.getLogger("distill")


def check_labels(model: PreTrainedModel, task: Task, what: str) -> None:
    """UserError where the model's label names are not the task's, id by id; then its config has the task's."""
    compare_labels(model.config.id2label, task.names, what)
    set_labels(model, task)


def set_labels(model: PreTrainedModel, task: Task) -> None:
    """Write the task's label names, where it has any, into the model's config: for a head that is new or will be fine-tuned."""
    if task.names:
        model.config.id2label = dict(enumerate(task.names))
        model.config.label2id = {name: i for i, name in enumerate(task.names)}


def compare_labels(declared: Any, names: tuple[str, ...], what: str) -> None:
    """UserError at the first id whose name differs, letter case aside. Names that only repeat the ids agree with all others."""
    if names and len(declared) != len(names):
        raise UserError(
            f"the {what} has {len(declared)} labels ({_listed(declared.values())}), but the data have {len(names)} ({_listed(names)}): "
            "take a model without a trained head, or data with the same labels"
        )
    if _only_ids(declared.values()) or _only_ids(names):
        return
    for i, name in enumerate(names):
        if declared[i].casefold() != name.casefold():
            raise UserError(
                f"the {what}'s label {i} is {declared[i]}, but the data's label {i} is {name}: "
                f"set data.labels to the {what}'s order, [{', '.join(declared[i] for i in sorted(declared))}]"
            )


def _only_ids(names: Iterable[str]) -> bool:
    return all(re.fullmatch(rf"(LABEL_)?{i}", name) for i, name in enumerate(names))


def _listed(names: Iterable[str], most: int = 6) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def check_tokens(
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """UserError naming the first ids whose tokens differ: all models of a run read the same encoded examples."""
    vocabulary_size, others = (
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs)
    )
    differing = [
        i
        for i in sorted(vocabulary_size.keys() | others.keys())
        if vocabulary_size.get(i) != others.get(i)
    ]
    if differing:
        shown = "; ".join(
            f"{i} is {vocabulary_size.get(i, 'nothing')} and {others.get(i, 'nothing')}"
            for i in differing[:3]
        )
        raise UserError(
            f"the vocabularies of {names[0]} and {names[1]} differ at {len(differing)} ids ({shown}), but both must read the same ids: "
            "take two models with one tokenizer, or cut the student from the teacher's layers"
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a model must have for every token."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_logits(
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    existing: bool = False,
) -> int | None:
    """Number of tokens to slice both language models' logits to; null where they are equally wide, as classifiers' always are.

    `existing`: also where the logits of both are as wide, but for more tokens than there are.
    """
    ours, theirs = num_logits(student), num_logits(teacher)
    if ours == theirs and not (existing and ours > vocabulary_size(tokenizer)):
        return None
    shared = vocabulary_size(tokenizer)
    if min(ours, theirs) < shared:
        raise UserError(
            f"the tokenizer has {shared} ids, but the student's logits have {ours} classes and the teacher's {theirs}: "
            "take models that can predict every token"
        )
    log.info(
        "the student's logits have %d classes, the teacher's %d: both are sliced to the %d tokens that exist",
        ours,
        theirs,
        shared,
    )
    return shared


def num_logits(model: PreTrainedModel) -> int:
    """Logits in a row: tokens of a language model's head, or labels."""
    head = model.get_output_embeddings()
    return head.out_features if isinstance(head, nn.Linear) else model.config.num_labels or 0


def check_floats(model: PreTrainedModel, what: str) -> None:
    """UserError where the weights are the integers of a quantization library, which cannot train and have no fingerprint."""
    stored = model.config.to_dict().get("quantization_config")
    if stored:
        raise UserError(
            f"the {what}'s weights are stored by {stored.get('quant_method')}, but here they must be floats: name the folder `student` of "
            "the run that exported it, or a dense or packed export"
        )


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """UserError where texts of `length` tokens have more positions than the model."""
    most = max_positions(model)
    if most is not None and length > most:
        raise UserError(
            f"task.max_length is {length}, but the {what} has only {most} positions: set task.max_length to {most} or less"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest input in tokens; null where the config does not say."""
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    family = ARCHITECTURES.get(model.config.model_type)
    if most is not None and family is not None and family.positions_after_pad:
        return most - int(model.config.pad_token_id) - 1
    return most


def fingerprint(model: nn.Module) -> str:
    """sha256 over the config and over names, types, shapes and bytes of the state dict, wherever and however it is in memory."""
    settings = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    decisive = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
