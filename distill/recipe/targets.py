"""`_target_`: a dotted path -> the class or function it names, called with the keys beside it.

Its signature is the schema of those keys. It is read from the source text, so that a misspelled
argument is refused before torch is imported.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import UserError

__all__ = [
    "Signature",
    "check_target",
    "did_you_mean",
    "import_object",
    "instantiate",
    "read_signature",
]


class Signature(NamedTuple):
    """The keyword arguments of a class or function, and those without a default."""

    names: list[str]
    required: list[str]


def instantiate(spec: dict[str, Any]) -> Any:
    """Call the class or function that `_target_` names, with the other keys as arguments.

    Raises:
        UserError: if it cannot be imported, or raises TypeError or ValueError.

    Example:
        >>> instantiate({"_target_": "collections.Counter", "a": 2})
        Counter({'a': 2})
    """
    arguments = dict(spec)
    path = arguments.pop("_target_")
    try:
        return import_object(path)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is given {arguments}, but it does not accept them ({error}): "
            "correct its arguments"
        ) from error


def import_object(path: str) -> Any:
    """Import the object that a dotted path names.

    Raises:
        UserError: if it does not exist.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be imported ({error}), but it must be the dotted path of a class or "
            "function: check its spelling"
        ) from error


def check_target(key: str, spec: dict[str, Any]) -> None:
    """Check a `_target_` and the names of its arguments without importing it.

    Args:
        key: key of the recipe, for messages.
        spec: `_target_` and the arguments beside it.

    Raises:
        UserError: if the target does not exist, an argument is unknown, or one is missing.
    """
    path = spec.get("_target_")
    if not isinstance(path, str) or "." not in path:
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
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            raise UserError(
                f"{path} names the module {module}, but there is no such module: "
                "check its spelling, or install it"
            )
        folders = spec.submodule_search_locations or []
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text())


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
