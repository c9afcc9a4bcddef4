"""`_target_`: a dotted path -> the class or function it names, called with the keys beside it.

Its signature is the schema of those keys. It is read from the source text, so that a misspelled
argument is refused before torch is imported, and code that is not trusted before it is imported.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distill.errors import UserError
from distill.recipe import trust

__all__ = [
    "Signature",
    "check_target",
    "describe_error",
    "did_you_mean",
    "import_function",
    "import_object",
    "instantiate",
    "read_signature",
    "user_error",
]

T = TypeVar("T")


class Signature(NamedTuple):
    """The keyword arguments of a class or function, and those without a default."""

    names: list[str]
    required: list[str]


def instantiate(key: str, spec: dict[str, Any], base: type[T]) -> T:
    """Call the class that `_target_` names, with the other keys as arguments.

    Args:
        key: key of the recipe, for messages.
        spec: `_target_` and the arguments beside it.
        base: the class must be a subclass of it; nothing else is called.

    Raises:
        UserError: if it cannot be imported, is no such class, or its constructor raises.

    Example:
        >>> instantiate("task", {"_target_": "distill.tasks.Regression"}, Task)
        <distill.tasks.regression.Regression object>
    """
    arguments = dict(spec)
    path = arguments.pop("_target_")
    created = import_object(path)
    if not (isinstance(created, type) and issubclass(created, base)):
        raise UserError(
            f"{key} is {path}, but that is no subclass of {base.__module__}.{base.__qualname__}: "
            "name one"
        )
    try:
        return created(**arguments)
    except TypeError as error:
        raise UserError(
            f"{path} is given {arguments}, but it does not accept them ({error}): "
            "correct its arguments"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise user_error(key, path, error) from error


def import_function(
    key: str, path: str, *arguments: str, optional: Collection[str] = ()
) -> Callable[..., Any]:
    """Import a function that accepts these arguments by position; it is not called.

    Args:
        key: key of the recipe, for messages.
        path: dotted path of the function.
        arguments: names of the arguments.
        optional: names of arguments that are passed by keyword if the function has them.

    Raises:
        UserError: if it cannot be imported, or does not accept them.
    """
    function = import_object(path)
    try:
        if isinstance(function, type) or not callable(function):
            raise TypeError("it is no function")
        signature = inspect.signature(function)
        signature.bind(*arguments, **{n: n for n in optional if n in signature.parameters})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key} is {path}, but it must be a function of ({', '.join(arguments)}), "
            f"and {error}: name another, or change its arguments"
        ) from error
    return function


def import_object(path: str) -> Any:
    """Import the object that a dotted path names, from a module that is trusted.

    Raises:
        UserError: if it does not exist, or is defined in a module that is not trusted.
    """
    read_signature(path)
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's code may raise anything
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be imported ({describe_error(error)}), but it must be the dotted path "
            "of a class or function: correct it"
        ) from error
    origin = getattr(target, "__module__", None)
    if isinstance(origin, str) and origin in sys.modules:
        trust.find_module(origin, path)  # it may be assigned rather than imported by name
    return target


def user_error(key: str, path: str, error: BaseException) -> UserError:
    """The error of code that a recipe names, as one sentence with its place in that code."""
    return UserError(
        f"{key} is {path}, but it raised {describe_error(error)}: correct it, or name another"
    )


def describe_error(error: BaseException) -> str:
    """The type and first line of an exception, and the last line of the user's code before it."""
    text = str(error).strip().split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if trust.in_project(frame.filename)]
    place = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    return f"{type(error).__name__}{': ' * bool(text)}{text}{place}"


def check_target(key: str, spec: dict[str, Any]) -> None:
    """Check a `_target_` and the names of its arguments without importing it.

    Args:
        key: key of the recipe, for messages.
        spec: `_target_` and the arguments beside it.

    Raises:
        UserError: if the target does not exist, an argument is unknown, or one is missing.
    """
    path = spec.get("_target_") if isinstance(spec, dict) else spec
    if not isinstance(spec, dict) or not isinstance(path, str) or "." not in path:
        raise UserError(
            f"{key}._target_ is {path}, but it must be the dotted path of a class: "
            "such as distill.tasks.SingleLabelClassification"
        )
    signature = read_signature(path)
    if signature is None:
        return
    for argument in spec.keys() - {"_target_"}:
        if argument not in signature.names:
            suggestion = did_you_mean(argument, signature.names)
            raise UserError(
                f"{key}.{argument} is given, but {path} has no such argument: {suggestion}"
            )
    for argument in signature.required:
        if argument not in spec:
            raise UserError(
                f"{key}.{argument} is not given, but {path} requires it: "
                f"set it beside {key}._target_"
            )


def did_you_mean(name: str, known: list[str]) -> str:
    """The hint for a misspelled name: the closest known name, then all of them."""
    close = get_close_matches(name, known, n=1)
    suggestion = f"did you mean {close[0]}? " if close else ""
    return f"{suggestion}choose from {', '.join(known) or 'none'}"


def read_signature(path: str) -> Signature | None:
    """Read the arguments of a class or function from its source, without importing it.

    Returns:
        The signature; None where the source does not determine it, as with ``**kwargs``.

    Raises:
        UserError: if there is no such module, class or function.
    """
    module, _, name = path.rpartition(".")
    tree = _parse_module(module, path)
    if tree is None:
        return None
    definitions = {
        node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    definition = definitions.get(name)
    if isinstance(definition, ast.ClassDef):
        return _class_signature(definition, definitions)
    if isinstance(definition, ast.FunctionDef):
        return _function_signature(definition)
    imported = dict(_imported_names(tree, module))
    if name in imported:
        return read_signature(imported[name])
    if not module.startswith("distill") and _may_define_more(tree):
        return None
    known = _public_names(definitions, name) or _public_names(imported, name)
    raise UserError(f"{path} is given, but {module} has no {name}: {did_you_mean(name, known)}")


def _parse_module(module: str, path: str) -> ast.Module | None:
    """Parse a module without importing it or its parents; None if it has no Python source."""
    spec = trust.find_module(module, path)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} is in {spec.origin}, but that is no Python source ({error}): correct it"
        ) from error


def _imported_names(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(name, dotted path) of each ``from origin import name`` at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = importlib.util.resolve_name("." * node.level + origin, module)
            for alias in node.names:
                yield alias.asname or alias.name, f"{origin}.{alias.name}"


def _may_define_more(tree: ast.Module) -> bool:
    """Whether a module may have names that its definitions and imports do not show."""
    dynamic = (ast.Assign, ast.AnnAssign, ast.If, ast.Try)
    return any(isinstance(node, dynamic) for node in tree.body)


def _public_names(names: Iterable[str], like: str) -> list[str]:
    """Public names of classes if `like` is capitalized, else those of functions."""
    return [name for name in names if name[0] != "_" and name[0].isupper() == like[:1].isupper()]


def _class_signature(node: ast.ClassDef, siblings: dict[str, Any]) -> Signature | None:
    """Arguments of `__init__` or a dataclass's fields, else those of a base in the same file."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _function_signature(item)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = {
            item.target.id: item.value
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        return Signature(list(fields), [name for name, value in fields.items() if value is None])
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if bases and bases[0] in siblings:
        return _class_signature(siblings[bases[0]], siblings)
    return None


def _function_signature(function: ast.FunctionDef) -> Signature | None:
    arguments = function.args
    if arguments.kwarg:
        return None
    positional = [argument.arg for argument in arguments.args if argument.arg != "self"]
    required = positional[: max(0, len(positional) - len(arguments.defaults))]
    required += [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    return Signature(positional + [argument.arg for argument in arguments.kwonlyargs], required)
