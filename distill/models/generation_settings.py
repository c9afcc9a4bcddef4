"""A language model's generation config: stop tokens and sampling settings, which travel with it."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from distill.errors import UserError

log = logging.getLogger("distill")

# Keys that hold ids of tokens besides `*_token_id`: one list, or a list of lists.
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def inherit_generation(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Give a student that was built here the generation config of its teacher, where it has one.

    A config that transformers derived from the model's own is no setting of the teacher's.
    """
    if not (student.can_generate() and teacher.can_generate()):
        return
    settings = teacher.generation_config
    if not settings.to_dict().get("_from_model_config"):
        student.generation_config = copy.deepcopy(settings)


def generation_identity(model: PreTrainedModel) -> dict[str, str]:
    """The part of a stored model's key that its generation config is; empty if it is derived.

    It is stored with the model, but is not part of its config.
    """
    if not model.can_generate() or model.generation_config.to_dict().get("_from_model_config"):
        return {}
    return {"generation": model.generation_config.to_json_string(ignore_metadata=True)}


def read_generation(model: PreTrainedModel, folder: str) -> None:
    """Read the generation config of a model that was built from its other config alone."""
    with suppress(OSError):  # most folders have none
        model.generation_config = GenerationConfig.from_pretrained(folder)


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids at which generation ends: all of the model's, or else the tokenizer's."""
    ids = model.generation_config.eos_token_id if model.can_generate() else None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        return []
    return [*ids] if isinstance(ids, list) else [ids]


def end_of_replies(labels: Sequence[Sequence[int]], tokenizer: Any) -> int | None:
    """The special token with which most texts end that a model learns to write.

    Args:
        labels: Labels of some encoded examples, -100 where a token is context only.
        tokenizer: Encoded them.

    Returns:
        Its id; None if most texts end without one.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    last = (next((each for each in reversed(ids) if each in special), None) for ids in labels)
    counts = Counter(each for each in last if each is not None).most_common(1)
    return counts[0][0] if counts and 2 * counts[0][1] >= len(labels) else None


def stop_at(student: PreTrainedModel, end: int | None, tokenizer: Any) -> None:
    """Make generation by the student stop at the token with which its replies end."""
    stops = stop_tokens(student, tokenizer)
    if end is None or end in stops or not student.can_generate():
        return
    student.generation_config.eos_token_id = [*stops, end]
    log.info(
        "the student's replies end with %s, but its generation stops at %s only: "
        "it is added to eos_token_id of its generation config",
        tokenizer.convert_ids_to_tokens(end),
        _tokens(stops, tokenizer) or "no token",
    )


def check_end(teacher: PreTrainedModel, end: int | None, tokenizer: Any) -> None:
    """Check that the replies in the data end as the teacher's do.

    Raises:
        UserError: The teacher's replies end with other tokens.
    """
    stops = stop_tokens(teacher, tokenizer)
    if end is None or end in stops or not teacher.can_generate():
        return
    raise UserError(
        f"the replies in the data end with {tokenizer.convert_ids_to_tokens(end)}, but the "
        f"teacher's end with {_tokens(stops, tokenizer)}, so that it would teach other ends than "
        "the labels: take the tokenizer and chat template of the teacher, or fine-tune it with "
        "teacher.finetune"
    )


def _tokens(ids: Iterable[int], tokenizer: Any) -> str:
    return " or ".join(str(tokenizer.convert_ids_to_tokens(each)) for each in ids)


def renumber_generation(settings: GenerationConfig, new_ids: Mapping[int, int]) -> None:
    """Replace the ids of tokens, in place; ids without a new one are removed."""
    for key, value in settings.to_dict().items():
        if value is not None and (key.endswith("_token_id") or key in _ID_LISTS):
            setattr(settings, key, renumber_ids(value, new_ids))


def renumber_ids(value: Any, new_ids: Mapping[int, int]) -> Any:
    """New ids for an id (None if it has none), or for those in a list (left out)."""
    if not isinstance(value, list):
        return new_ids.get(value)
    renumbered = (renumber_ids(each, new_ids) for each in value)
    return [each for each in renumbered if each is not None]
