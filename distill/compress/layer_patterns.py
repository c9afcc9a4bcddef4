"""Patterns of names in a recipe -> layers of a student."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models import blocks, group_names
from distill.remote_code.modeling import LINEAR

__all__ = ["expand_low_rank", "select_modules"]


def select_modules(
    student: PreTrainedModel,
    patterns: Iterable[str] | None,
    kinds: tuple[type[nn.Module], ...] = LINEAR,
) -> dict[str, nn.Module]:
    """Select the layers that the `layers` of a callback names.

    Args:
        student: the model to search.
        patterns: for example ``*.ffn.lin1``, matched by :func:`fnmatch.fnmatchcase`. None selects
            all layers in the transformer blocks.
        kinds: classes of the layers to select.

    Returns:
        Name -> layer, in the order of `named_modules`.

    Raises:
        UserError: if a pattern matches no layer.
    """
    if isinstance(patterns, str):
        raise UserError(f"layers is {patterns}, but it must be a list of patterns: [{patterns}]")
    layers = {name: module for name, module in student.named_modules() if isinstance(module, kinds)}
    if patterns is None:
        in_blocks = {id(module) for block in blocks(student) for module in block.modules()}
        return {name: layer for name, layer in layers.items() if id(layer) in in_blocks}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            choices = ", ".join(group_names(layers))
            raise UserError(
                f"layers has {pattern}, but no layer of the student matches: name some of {choices}"
            )
    return {
        name: layer
        for name, layer in layers.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def expand_low_rank(
    layers: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...] = LINEAR
) -> dict[str, Any]:
    """Replace each :class:`LowRank` layer by its two factors; only modules of `kinds` are kept."""
    return {
        name: part
        for outer, layer in layers.items()
        for name, part in layer.named_modules(prefix=outer)
        if isinstance(part, kinds)
    }
