"""The width of logits, and language models with logits of tokens that do not exist."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.vocabulary import vocabulary_size

log = logging.getLogger("distill")


def num_logits(model: PreTrainedModel) -> int:
    """The width of the logits: tokens of a language model's head, or labels."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return model.config.num_labels or 0
    return head.out_features if isinstance(head, nn.Linear) else model.config.vocab_size


def cut_to_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str = "student"
) -> None:
    """Remove the rows of a language model for tokens that the tokenizer does not have.

    A softmax over them would be trained, measured and exported with tokens that do not exist, as
    after padding to a multiple of 64. The rows of all tokens keep their values.

    Args:
        model: Changed in place, with its config; left as it is if its head is no `nn.Linear`.
        tokenizer: Its ids are those that the model reads.
        role: `teacher` or `student`, for the log.
    """
    size, width = vocabulary_size(tokenizer), num_logits(model)
    if type(model.get_output_embeddings()) is not nn.Linear or width <= size:
        return
    with torch.random.fork_rng(devices=[]):  # transformers initializes rows, then replaces them
        model.resize_token_embeddings(size, mean_resizing=False)
    log.info(
        "the %s's logits have %d classes, and the tokenizer %d tokens: "
        "the rows of the others are removed",
        role,
        width,
        size,
    )


def shared_logits(
    tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, teacher: PreTrainedModel
) -> int | None:
    """The number of tokens to which the logits of two language models are sliced.

    Args:
        tokenizer: The tokenizer that encodes the examples.
        student: The student, after :func:`cut_to_vocabulary`.
        teacher: The teacher.

    Returns:
        The size of the vocabulary; None if nothing is sliced, as for classifiers.

    Raises:
        UserError: One of the models has fewer logits than the vocabulary has tokens.
    """
    if student.get_output_embeddings() is None:
        return None
    widths, shared = (num_logits(student), num_logits(teacher)), vocabulary_size(tokenizer)
    if min(widths) < shared:
        raise UserError(
            f"the tokenizer has {shared} ids, but the student's logits have {widths[0]} classes "
            f"and the teacher's {widths[1]}: take models that can predict every token"
        )
    if widths == (shared, shared):
        return None
    log.info(
        "the student's logits have %d classes, the teacher's %d: "
        "both are sliced to the %d tokens of the vocabulary",
        *widths,
        shared,
    )
    return shared
