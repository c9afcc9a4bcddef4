"""`${...}` in recipes: which are allowed, and how the values of environment variables stay secret.

`${key.path}` is another key of the recipe. `${oc.env:NAME}` is an environment variable. Its value
may be a secret: saved recipes, logs, cards and trackers hold the reference in its place.
"""

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from distill.errors import UserError

__all__ = ["HideValues", "check_references", "hide", "hide_in_values"]

# a key, or a variable with an optional default, without another reference inside
_REFERENCE = re.compile(
    r"\$\{\s*(?:oc\.env\s*:\s*(?P<variable>[A-Za-z_]\w*)\s*(?:,[^${}]*)?|[^${}:]*)\}"
)
_NESTED = "\0"  # in place of a reference inside of another; part of no name of a variable
_DEEPEST = 10  # references inside of each other
_SHORTEST = 4  # characters of a value that is hidden; shorter ones are parts of common words

_names: set[str] = set()  # environment variables to which recipes of this process refer


def check_references(plain: Any, key: str = "") -> None:
    """Check and remember the references of a recipe, before any is resolved.

    Args:
        plain: a composed recipe, or the part of it under `key`, with its references as texts.
        key: key of this part.

    Raises:
        UserError: if a recipe refers to anything but its keys and environment variables.
    """
    for name, text in _texts(plain, key):
        remaining = text
        for _ in range(_DEEPEST):
            variables = (match["variable"] for match in _REFERENCE.finditer(remaining))
            _names.update(each for each in variables if each)
            remaining = _REFERENCE.sub(_NESTED, remaining)
        if "${" in remaining:
            raise UserError(
                f"{name} is {text}, but a recipe may only refer to its keys and to "
                "environment variables by their names, ${oc.env:NAME}: write the value itself"
            )


def hide(text: str) -> str:
    """Replace the values of environment variables to which a recipe refers by their references."""
    values = {os.environ.get(name, ""): name for name in sorted(_names)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"${{oc.env:{values[value]}}}")
    return text


def hide_in_values(plain: Any) -> Any:
    """The same for all texts in dictionaries and lists."""
    if isinstance(plain, dict):
        return {name: hide_in_values(value) for name, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [hide_in_values(value) for value in plain]
    return hide(plain) if isinstance(plain, str) else plain


class HideValues(logging.Filter):
    """Hides the values in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (hidden := hide(message)) != message:
            record.msg, record.args = hidden, ()
        return True


def _texts(plain: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, text) of every text in dictionaries and lists."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(plain, list):
        for value in plain:
            yield from _texts(value, key)
    elif isinstance(plain, str):
        yield key, plain
