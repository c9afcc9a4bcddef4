"""Checks that teacher, student and data agree: labels, token ids, lengths.

Also the fingerprint of a model, which is part of the key of stored results.
"""

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

# Keys of a config that do not change a model's outputs.
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "architectures")
MAX_SHOWN = 6  # names in a message
log = logging.getLogger("distill")


def check_labels(model: PreTrainedModel, task: Task, role: str) -> None:
    """Set the task's label names in the model's config.

    Args:
        model: A model whose head has been trained.
        task: A task that is bound to the labels of the data.
        role: `teacher` or `student`, for messages.

    Raises:
        UserError: The label names in the model's config differ from the task's.
    """
    compare_labels(model.config.id2label, task.names, role)
    set_labels(model, task)


def set_labels(model: PreTrainedModel, task: Task) -> None:
    """Set the task's label names, where it has any, in the config of a model to be trained."""
    if task.names:
        model.config.id2label = dict(enumerate(task.names))
        model.config.label2id = {name: i for i, name in enumerate(task.names)}


def compare_labels(declared: Any, names: tuple[str, ...], role: str) -> None:
    """Check that label names agree, ignoring case; UserError with the first id that differs.

    Names that only repeat the ids (`LABEL_0`, `0`) agree with any others.

    Args:
        declared: `id2label` of a model.
        names: Label names of the data, by id.
        role: `teacher` or `student`.
    """
    if names and len(declared) != len(names):
        raise UserError(
            f"the {role} has {len(declared)} labels ({_shorten(declared.values())}), but the data "
            f"have {len(names)} ({_shorten(names)}): "
            "take a model without a trained head, or data with the same labels"
        )
    if _only_ids(declared.values()) or _only_ids(names):
        return
    for i, name in enumerate(names):
        if declared[i].casefold() != name.casefold():
            order = ", ".join(declared[i] for i in sorted(declared))
            raise UserError(
                f"the {role}'s label {i} is {declared[i]}, but the data's label {i} is {name}: "
                f"set data.labels to the {role}'s order, [{order}]"
            )


def _only_ids(names: Iterable[str]) -> bool:
    return all(re.fullmatch(rf"(LABEL_)?{i}", name) for i, name in enumerate(names))


def _shorten(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:MAX_SHOWN]) + (", ..." if len(shown) > MAX_SHOWN else "")


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Check that two vocabularies agree, since all models read the same encoded examples.

    Args:
        tokenizer: Compared with `reference`.
        reference: The tokenizer that encodes the examples.
        names: The owners of the two tokenizers, for the message.

    Raises:
        UserError: Ids have different tokens; the message has the first ones.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    expected = {i: token for token, i in reference.get_vocab().items()}
    differing = [
        i for i in sorted(tokens.keys() | expected.keys()) if tokens.get(i) != expected.get(i)
    ]
    if differing:
        shown = "; ".join(
            f"{i} is {tokens.get(i, 'nothing')} and {expected.get(i, 'nothing')}"
            for i in differing[:3]
        )
        raise UserError(
            f"the vocabularies of {names[0]} and {names[1]} differ at {len(differing)} ids "
            f"({shown}), but both must read the same ids: take two models with one tokenizer, "
            "or build the student from the teacher's layers"
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that a model needs: the highest id of a token, plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_logits(
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    existing: bool = False,
) -> int | None:
    """The number of tokens to which the logits of two language models are sliced.

    Args:
        tokenizer: The tokenizer of both models.
        student: The student.
        teacher: The teacher.
        existing: Slice logits of equal width too, where they are wider than the vocabulary.

    Returns:
        The size of the vocabulary; None if nothing is sliced, as for classifiers.

    Raises:
        UserError: One of the models has fewer logits than the vocabulary has tokens.
    """
    widths = num_logits(student), num_logits(teacher)
    if widths[0] == widths[1] and not (existing and widths[0] > vocabulary_size(tokenizer)):
        return None
    shared = vocabulary_size(tokenizer)
    if min(widths) < shared:
        raise UserError(
            f"the tokenizer has {shared} ids, but the student's logits have {widths[0]} classes "
            f"and the teacher's {widths[1]}: take models that can predict every token"
        )
    log.info(
        "the student's logits have %d classes, the teacher's %d: "
        "both are sliced to the %d tokens of the vocabulary",
        *widths,
        shared,
    )
    return shared


def num_logits(model: PreTrainedModel) -> int:
    """The width of the logits: tokens of a language model's head, or labels."""
    head = model.get_output_embeddings()
    return head.out_features if isinstance(head, nn.Linear) else model.config.num_labels or 0


def check_not_quantized(model: PreTrainedModel, role: str) -> None:
    """UserError if the weights are stored by a quantization library and cannot be trained."""
    stored = model.config.to_dict().get("quantization_config")
    if stored:
        raise UserError(
            f"the {role}'s weights are stored by {stored.get('quant_method')}, but here they must "
            "be floats: name the folder `student` of the run that exported it, or a dense or "
            "packed export"
        )


def check_length(model: PreTrainedModel, length: int, role: str) -> None:
    """UserError if the model has fewer positions than `length` tokens."""
    most = max_positions(model)
    if most is not None and length > most:
        raise UserError(
            f"task.max_length is {length}, but the {role} has only {most} positions: "
            f"set task.max_length to {most} or less"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest input in tokens; None if the config does not limit it."""
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    family = ARCHITECTURES.get(model.config.model_type)
    if most is not None and family is not None and family.positions_after_pad:
        return most - int(model.config.pad_token_id) - 1
    return most


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the config and of names, dtypes, shapes and bytes of the state dict.

    It does not depend on the device or the memory layout.
    """
    settings = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    relevant = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
