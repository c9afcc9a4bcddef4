"""Which code a recipe may name. A recipe is data that may come from somebody else.

A dotted path is followed through the source text of modules, which imports nothing. Every module
on the way must be part of distill, torch or lightning, or of the user's project: the current
directory and the folder of the running script, without the environments in them. Other modules
must be named on the command line, `trust=my_package`, or in the environment variable DISTILL_TRUST.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from distill.errors import UserError

__all__ = ["VARIABLE", "find_module", "in_project", "take_from_arguments"]

VARIABLE = "DISTILL_TRUST"
_ARGUMENT = "trust="
_LIBRARIES = ("distill", "torch", "lightning")
_STANDARD_FINDERS: tuple[Any, ...] = (BuiltinImporter, FrozenImporter, PathFinder)
_INSTALLED = ("site-packages", "dist-packages")


def take_from_arguments(arguments: list[str]) -> list[str]:
    """Move the modules of `trust=A,B` on a command line to the environment, for all processes.

    Returns:
        The other arguments.
    """
    named = [text.removeprefix(_ARGUMENT) for text in arguments if text.startswith(_ARGUMENT)]
    if named:
        os.environ[VARIABLE] = ",".join([*_named_by_user(), *named])
    return [text for text in arguments if not text.startswith(_ARGUMENT)]


def find_module(module: str, path: str) -> ModuleSpec | None:
    """Find a module without importing it or its parents.

    Args:
        module: its dotted name.
        path: the dotted path in the recipe that leads to it, for messages.

    Raises:
        UserError: if there is no such module, or it is not trusted.
    """
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _find_spec(name, folders)
        if spec is None and name not in sys.builtin_module_names:
            raise UserError(
                f"{path} names the module {module}, but there is no such module: "
                "check its spelling, or install it"
            )
        if not _is_trusted(name, spec):
            raise UserError(
                f"{path} is in the module {name}, but a recipe may only name code of "
                f"{', '.join(_LIBRARIES)} and of the current directory: if you trust it, add "
                f"trust={module.partition('.')[0]} to the command, or set {VARIABLE}"
            )
        folders = _folders(spec)
    return spec


def in_project(file: str | Path) -> bool:
    """Whether a source file is part of the user's project."""
    location = Path(file).resolve()
    return any(
        location.is_relative_to(folder)
        and not set(location.relative_to(folder).parts) & set(_INSTALLED)
        and not location.is_relative_to(Path(os.__file__).resolve().parent)
        for folder in _project_folders()
    )


def _find_spec(name: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """Of a module on the path, or of one that an editable installation adds to the finders."""
    others: Any = (finder for finder in sys.meta_path if finder not in _STANDARD_FINDERS)
    specs = (finder.find_spec(name, folders) for finder in (PathFinder, *others))
    return next((spec for spec in specs if spec is not None), None)


def _is_trusted(module: str, spec: ModuleSpec | None) -> bool:
    trusted = (*_LIBRARIES, *_named_by_user())
    if any(module == name or module.startswith(f"{name}.") for name in trusted):
        return True
    # a package whose submodule is trusted
    if any(name.startswith(f"{module}.") for name in trusted):
        return True
    if spec is None:
        return False
    files = [spec.origin] if spec.has_location else []
    return any(file and in_project(file) for file in (*files, *_folders(spec)))


def _folders(spec: ModuleSpec | None) -> list[str]:
    """Where the submodules of a package are; none for a module."""
    return list((spec and spec.submodule_search_locations) or [])


def _named_by_user() -> list[str]:
    names = os.environ.get(VARIABLE, "").split(",")
    return [name.strip() for name in names if name.strip()]


def _project_folders() -> Iterator[Path]:
    yield Path.cwd().resolve()
    script = getattr(sys.modules["__main__"], "__file__", None)
    folder = None if script is None else Path(script).resolve().parent
    if folder is not None and not set(folder.parts) & set(_INSTALLED):
        yield folder
