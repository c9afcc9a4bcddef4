"""The text of ``--help``: every key of a recipe with its default and its documentation."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import omegaconf

from distill.recipe.config import Run

__all__ = ["field_docs", "key_table"]

_COLUMN, _WIDTH = 30, 110


def key_table(section: type = Run, indent: str = "") -> str:
    """The keys of a section of the recipe, and of the sections in it, one below the other.

    Args:
        section: a dataclass of :mod:`distill.recipe.config`.
        indent: put before each key.
    """
    docs, hints = field_docs(section), get_type_hints(section)
    return "\n".join(
        line
        for field in fields(section)
        for line in _lines(field, hints[field.name], docs.get(field.name, ""), indent)
    )


def field_docs(section: type) -> dict[str, str]:
    """The string below each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _lines(field: Field, hint: Any, doc: str, indent: str) -> Iterator[str]:
    nested = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
    if nested is None:
        yield _entry(f"{indent}{field.name}: {_default(field)}", doc)
        return
    assert isinstance(nested, type)
    yield _entry(f"{indent}{field.name}:", doc or str(nested.__doc__))
    yield key_table(nested, indent + "  ")


def _entry(key: str, doc: str) -> str:
    """The key, and its documentation in the second column."""
    lines = textwrap.wrap(doc, _WIDTH - _COLUMN) or [""]
    if len(key) >= _COLUMN:
        lines.insert(0, "")
    start = f"{key:{_COLUMN - 1}} {lines[0]}".rstrip()
    return "\n".join([start, *(" " * _COLUMN + line for line in lines[1:])])


def _default(field: Field) -> str:
    """The default as YAML writes it."""
    value = field.default
    if value is NO_DEFAULT and field.default_factory is not NO_DEFAULT:
        value = field.default_factory()
    if value == omegaconf.MISSING:
        return "(required)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "")
