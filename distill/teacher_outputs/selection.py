"""The recipe's `teacher.outputs` -> the stored form of a teacher's outputs."""

import logging

from transformers import PreTrainedModel

from distill.errors import UserError
from distill.recipe import config
from distill.tasks.base import Task
from distill.teacher_outputs.outputs import HiddenStateOutputs, LogitOutputs, TeacherOutputs
from distill.teacher_outputs.sparse_outputs import SampledOutputs, TopKOutputs

log = logging.getLogger(__name__)


def check_outputs(settings: config.Teacher, task: Task) -> None:
    """UserError if `teacher.outputs` is not for the task; a warning if it is biased."""
    if settings.outputs not in ("cached", "online", "base") and not task.selects_positions:
        raise UserError(
            f"teacher.outputs is {settings.outputs}, but it is for language models, and "
            f"{type(task).__name__} has few logits per row: set teacher.outputs=cached"
        )
    if settings.outputs == "top_k":
        log.warning(
            "teacher.outputs is top_k: the student learns that all but the teacher's %d likeliest "
            "tokens are impossible, however long it is trained; sampled takes fewer bytes and has "
            "the right gradient on average",
            settings.tokens,
        )


def build_outputs(
    settings: config.Teacher,
    teacher: PreTrainedModel,
    task: Task,
    temperature: float,
    tokens: int,
    seed: int,
) -> TeacherOutputs:
    """Build the stored form of a teacher's outputs that the recipe selects.

    Args:
        settings: The recipe's section `teacher`.
        teacher: The teacher, in the dtype of its forward.
        task: Selects the rows.
        temperature: Temperature of the loss.
        tokens: Size of the vocabulary.
        seed: Seed of the draws.
    """
    match settings.outputs:
        case "hidden":
            return HiddenStateOutputs(teacher, task)
        case "sampled":
            return SampledOutputs(teacher, task, temperature, tokens, settings.tokens, seed)
        case "top_k":
            return TopKOutputs(teacher, task, temperature, tokens, settings.tokens)
    return LogitOutputs(teacher, task)
