"""`_target_`: a dotted path -> the class it names, built with the keys beside it.

The signature of the class is the schema of those keys. It is read from the source text, so that a misspelt argument is
answered before torch is imported.
"""

import ast
import importlib
import importlib.util
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import UserError


class Signature(NamedTuple):
    """The keyword arguments of a class or function, and those without a default."""

    names: list[str]
    required: list[str]


def instantiate(spec: dict[str, Any]) -> Any:
    """`{_target_: package.Class, **arguments}` -> `package.Class(**arguments)`."""
    arguments = dict(spec)
    path = arguments.pop("_target_")
    try:
        return import_object(path)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is given {arguments}, but it cannot be made of that ({error}): correct its arguments"
        ) from error


def import_object(path: str) -> Any:
    """The object that a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be imported ({error}), but it must be the dotted path of a class or function: check its spelling"
        ) from error


def check_target(where: str, spec: dict[str, Any]) -> None:
    """Refuse a `_target_` that does not exist, and arguments that its class does not take."""
    path = spec.get("_target_")
    if not isinstance(path, str) or "." not in path:
        raise UserError(
            f"{where}._target_ is {path}, but it must be the dotted path of a class: such as distill.tasks.SingleLabelClassification"
        )
    known = read_signature(path)
    if known is None:
        return
    for key in spec.keys() - {"_target_"}:
        if key not in known.names:
            raise UserError(
                f"{where}.{key} is given, but {path} has no such argument: {did_you_mean(key, known.names)}"
            )
    for key in known.required:
        if key not in spec:
            raise UserError(
                f"{where}.{key} is not given, but {path} cannot do without: set it beside {where}._target_"
            )


def did_you_mean(wrong: str, known: list[str]) -> str:
    """The way out of a misspelling: `did you mean ...?`, then all names."""
    close = get_close_matches(wrong, known, n=1)
    return (
        f"did you mean {close[0]}? " if close else ""
    ) + f"choose from {', '.join(known) or 'none'}"


def read_signature(path: str) -> Signature | None:
    """The arguments of a class or function, from its source; None where only running it can tell."""
    module, _, name = path.rpartition(".")
    tree = _source(module, path)
    if tree is None:
        return None
    definitions = {
        node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    if name not in definitions:
        return _imported(tree, module, name, path, list(definitions))
    node = definitions[name]
    if isinstance(node, ast.ClassDef):
        return _constructor(node, definitions)
    return _arguments(node)


def _source(module: str, path: str) -> ast.Module | None:
    """The parsed source of a module, found without importing it or its parents; None where it has no Python source."""
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            raise UserError(
                f"{path} names the module {module}, but there is no such module: check its spelling, or install it"
            )
        folders = spec.submodule_search_locations or []
    return (
        ast.parse(Path(spec.origin).read_text())
        if spec and spec.origin and spec.origin.endswith(".py")
        else None
    )


def _imported(
    tree: ast.Module, module: str, name: str, path: str, defined: list[str]
) -> Signature | None:
    """Follow `from elsewhere import name`; a name that is nowhere is refused."""
    exported = []
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        for alias in node.names:
            exported.append(alias.asname or alias.name)
            if exported[-1] == name:
                origin = (
                    importlib.util.resolve_name("." * node.level + (node.module or ""), module)
                    if node.level
                    else str(node.module)
                )
                return read_signature(f"{origin}.{alias.name}")
    if any(
        isinstance(node, ast.Assign | ast.AnnAssign | ast.If | ast.Try) for node in tree.body
    ) and not module.startswith("distill"):
        return None
    alike = [
        [word for word in words if word[0].isupper() == name[:1].isupper() and word[0] != "_"]
        for words in (defined, exported)
    ]
    public = alike[0] or alike[1]
    raise UserError(f"{path} is given, but {module} has no {name}: {did_you_mean(name, public)}")


def _constructor(node: ast.ClassDef, siblings: dict[str, Any]) -> Signature | None:
    """Arguments of `__init__`, or a dataclass's fields; those of a base class of the same file where there are none."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [
            (item.target.id, item.value)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        return Signature(
            [name for name, _ in fields], [name for name, value in fields if value is None]
        )
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return _constructor(siblings[bases[0]], siblings) if bases and bases[0] in siblings else None


def _arguments(function: ast.FunctionDef) -> Signature | None:
    given = function.args
    if given.kwarg:
        return None
    positional = [argument.arg for argument in given.args]
    required = positional[: len(positional) - len(given.defaults)]
    required += [
        argument.arg
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is None
    ]
    names = positional + [argument.arg for argument in given.kwonlyargs]
    return Signature(
        [name for name in names if name != "self"], [name for name in required if name != "self"]
    )
