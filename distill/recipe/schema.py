"""The types that the schema gives to the keys of a recipe."""

from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from distill.errors import UserError
from distill.recipe.config import Run

__all__ = ["check_kinds", "describe_type", "is_optional_section", "types_along"]

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def types_along(key: str) -> list[Any]:
    """The type of each section of a dotted key, outermost first, until one is not in the schema.

    Example:
        >>> types_along("loss.alpha")
        [<class 'distill.recipe.config_training.Loss'>, <class 'float'>]
    """
    types: list[Any] = []
    section: Any = Run
    for name in key.split("."):
        if not is_dataclass(section) or name not in {field.name for field in fields(section)}:
            break
        assert isinstance(section, type)
        types.append(get_type_hints(section)[name])
        section = _not_none(types[-1])
    return types


def check_kinds(recipe: dict[str, Any], section: Any = Run, above: str = "") -> None:
    """Check that sections of a recipe are sections, and that no list is one.

    Raises:
        UserError: if one is not, which OmegaConf would report without its key.
    """
    for name, kind in get_type_hints(section).items():
        value, expected = recipe.get(name), _not_none(kind)
        is_section = is_dataclass(expected) or get_origin(expected) is dict
        is_list = get_origin(expected) is list
        if value is None or (isinstance(value, str) and "${" in value):
            continue
        if (is_section and not isinstance(value, dict)) or (is_list and isinstance(value, dict)):
            raise UserError(
                f"{above}{name} is {value!r}, but it must be {describe_type(kind)}: correct it, or "
                "leave it out"
            )
        if is_dataclass(expected):
            check_kinds(value, expected, f"{above}{name}.")


def is_optional_section(kind: Any) -> bool:
    """Whether a type is that of a section of keys that may be null."""
    section = _not_none(kind)
    return kind is not section and (is_dataclass(section) or get_origin(section) is dict)


def describe_type(kind: Any) -> str:
    """A type in words."""
    value = _not_none(kind)
    text = _KINDS.get(value, "another value")
    if is_dataclass(value):
        text = f"a section with the keys {', '.join(field.name for field in fields(value))}"
    elif get_origin(value) is list:
        text = f"a list of which each is {describe_type(get_args(value)[0])}"
    elif get_origin(value) is dict:
        text = "a section of keys"
    return text if value is kind else f"{text} or null"


def _not_none(kind: Any) -> Any:
    """X of `X | None`, and of any other type the type itself."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if NoneType in get_args(kind) else kind
