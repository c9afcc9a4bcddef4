"""The map in distill/__init__.py is true, imports point one way, and the style's measures hold."""

import ast
from pathlib import Path

import distill

ROOT = Path(distill.__file__).parent
FILES = [
    file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT or file.name != "__init__.py"
]


def top(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def functions():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield (
                    f"{file.relative_to(ROOT)}::{node.name}",
                    node.end_lineno - node.lineno + 1,
                    node,
                )


def test_public_names_are_importable():
    for name in distill.__all__:
        assert getattr(distill, name).__name__ == name
