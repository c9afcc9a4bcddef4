"""Check that the tensors in a model's file are those of its architecture."""

import re
from typing import Any

from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models.families import block_lists


def check_tensors(
    model: PreTrainedModel, report: dict[str, Any], name: str, role: str, strict: bool
) -> None:
    """UserError if the file and the config of a loaded model do not fit together.

    Args:
        model: The model as loaded.
        report: The loading info of `from_pretrained`.
        name: The model's name in the recipe.
        role: `teacher` or `student`.
        strict: Whether tensors of the head, too, must be in the file.
    """
    start, way_out = f"{role}.model is {name}, but", "save or download the model again"
    for tensor, stored, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{start} its {tensor} has the shape {list(stored)} in the file and {list(expected)} "
            f"by its config: {way_out}"
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    for tensor in [key for key in missing if strict or not is_in_head(key, model)]:
        if role == "teacher" and is_in_head(tensor, model):
            way_out = "set teacher.finetune to train it, or name a model that has been trained"
        raise UserError(
            f"{start} {tensor}, one of {len(missing)} missing tensors, is not in its file: "
            f"{way_out}"
        )
    for tensor in [key for key in unexpected if _is_beyond_last_block(key, model)]:
        raise UserError(
            f"{start} {tensor}, one of {len(unexpected)} surplus tensors, has no place in a model "
            f"of its config: {way_out}"
        )


def is_in_head(tensor: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the head, or to the pooler below it."""
    prefix = f"{model.base_model_prefix}."
    return not tensor.startswith(prefix) or tensor.startswith(f"{prefix}pooler.")


def _is_beyond_last_block(tensor: str, model: PreTrainedModel) -> bool:
    for path, modules in block_lists(model.base_model).items():
        block = re.match(rf"(?:{model.base_model_prefix}\.)?{re.escape(path)}\.(\d+)\.", tensor)
        if block and int(block.group(1)) >= len(modules):
            return True
    return False
