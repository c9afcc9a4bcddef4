"""Errors of OmegaConf and Hydra -> one sentence: the key, its value, what it must be."""

import re
from collections.abc import Iterator

from hydra.errors import OverrideParseException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from distill.errors import UserError
from distill.recipe.schema import describe_type, types_along
from distill.recipe.targets import did_you_mean

__all__ = ["explain_error"]


def explain_error(error: BaseException) -> str:
    """One sentence for an error of the command line or of a recipe, and for those it wraps."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            return (
                f"the argument is {cause.override}, but it must be key=value: "
                "quote a value with special characters, \"key='value'\""
            )
        if isinstance(cause, OmegaConfBaseException):
            return _explain_omegaconf(cause)
    return _explain_hydra(" ".join(str(error).split()))


def _explain_hydra(message: str) -> str:
    """The messages of Hydra about an argument that removes or adds a key, in our words."""
    if match := re.match(r"Could not delete from config\. '(.+?)' does not exist", message):
        return f"the argument is ~{match[1]}, but the recipe has no such key: leave it out"
    if match := re.match(
        r"Could not delete from config\. The value of '(.+?)' is (.*?) and", message
    ):
        return f"the argument removes {match[1]}, but its value is {match[2]}: leave the value out"
    if match := re.match(r"Could not append to config\. An item is already at '(.+?)'", message):
        return f"the argument is +{match[1]}, but the recipe has that key: leave the + out"
    if match := re.match(r"Ambiguous value for argument '(.+?)' 1\.", message):
        return (
            f"the argument is {match[1]}, but several values are a sweep: add -m, or write a list "
            "as key=[a,b], or a text with commas in quotes"
        )
    return message


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    key, section = str(error.full_key or error.key or ""), error.object_type
    message = " ".join(str(error.msg or error).split())
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        name, problem = key or "a value of the recipe", message.partition(" full_key:")[0]
        if match := re.match("Interpolation key '(.+)' not found", problem):
            problem = f"there is no key {match[1]}"
        return (
            f"{name} refers to another value, but {problem}: "
            "write the value itself, or set the environment variable"
        )
    if section is not None and "not in" in str(error):
        known = list(getattr(section, "__dataclass_fields__", {}))
        suggestion = did_you_mean(key.rpartition(".")[2], known)
        return f"{key} is given, but there is no such key: {suggestion}"
    types = types_along(key.partition("[")[0])
    if len(types) < len(key.split(".")):
        return f"{key}: {message}: correct it in the recipe or on the command line"
    value = repr(error.value)
    if error.value is None:
        is_null = "is not Optional" in message or "value 'None'" in message
        value = "null" if is_null else "of another kind"
    expected = describe_type(types[-1])
    return f"{key} is {value}, but it must be {expected}: correct it, or leave it out"
