"""Errors of OmegaConf and Hydra -> one sentence: the key, its value, what it must be."""

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
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    key, section = str(error.full_key or error.key), error.object_type
    message = " ".join(str(error.msg or error).split())
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        return (
            f"{key} refers to something that cannot be resolved ({message}): "
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
        value = "null" if "Optional" in message else "of another kind"
    expected = describe_type(types[-1])
    return f"{key} is {value}, but it must be {expected}: correct it, or leave it out"
