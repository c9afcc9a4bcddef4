"""The recipe's `group`, which says which entries of a weight share a scale -> `QuantSpec.group`."""

import logging

from distill.errors import UserError

__all__ = ["PER_ROW", "PER_TENSOR", "parse_group"]

log = logging.getLogger(__name__)

PER_ROW, PER_TENSOR = 0, -1
_WORDS = {"row": PER_ROW, "tensor": PER_TENSOR}


def parse_group(group: int | str | None) -> int | None:
    """Convert the `group` of a recipe to that of a `QuantSpec`.

    Args:
        group: ``row``, ``tensor``, a number of neighboring inputs, or None for the default. The
            numbers 0 (a row) and -1 (the tensor) are deprecated: they log a warning.

    Returns:
        Inputs that share a scale: 0 for a row, -1 for the tensor; None for the default.

    Raises:
        UserError: if it is none of these.
    """
    if group is None:
        return None
    if isinstance(group, str) and group in _WORDS:
        return _WORDS[group]
    if isinstance(group, int) and group in _WORDS.values():
        word = next(word for word, number in _WORDS.items() if number == group)
        log.warning("group is %d, which is deprecated: write group: %s", group, word)
        return group
    if isinstance(group, int) and group > 0:
        return group
    raise UserError(
        f"group is {group}, but it must be row, tensor or a number of inputs that share a scale: "
        "64 is a good start"
    )
