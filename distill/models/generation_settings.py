"""A language model's generation config: stop tokens and sampling settings, which travel with it."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

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


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids at which generation ends: all of the model's, or else the tokenizer's."""
    ids = model.generation_config.eos_token_id if model.can_generate() else None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        return []
    return [*ids] if isinstance(ids, list) else [ids]


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
