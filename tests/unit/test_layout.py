"""The map in distill/__init__.py is true, imports point one way, and the style's measures hold."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import distill

ROOT = Path(distill.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT or file.name != "__init__.py"]
# config <- tasks <- data, models <- teacher; losses, compress <- module <- callbacks <- train. A name imports lower ranks and its own.
RANKS = [
    {"errors", "signals"},
    {"config", "targets", "losses", "formats", "runtime", "store", "fresh", "chunked", "sparse"},
    {"recipe", "tasks", "corpora", "stages", "ranks"},
    {"cli", "data", "models", "tracking", "checkpoints", "resume"},
    {"terms", "compress", "launch", "sharding", "answers"},
    {"module", "packing"},
    {"evaluate"},
    {"callbacks", "export", "pace"},
    {"fit"},
    {"teacher", "student"},
    {"train"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def top(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def functions():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{file.relative_to(ROOT)}::{node.name}", node.end_lineno - node.lineno + 1, node


def test_the_map_lists_what_there_is():
    mapped = re.findall(r"^    (\w+)(?:\.py|/) ", distill.__doc__, re.MULTILINE)
    assert sorted(mapped) == sorted({top(file) for file in FILES})
    assert sorted(RANK) == sorted(mapped)


def test_public_names_are_importable():
    for name in distill.__all__:
        assert getattr(distill, name).__name__ == name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    tree = ast.parse(file.read_text())
    imported = set()
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill")):
        parts = (node.module or "").split(".")
        imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    wrong = {name for name in imported & RANK.keys() if RANK[name] >= RANK[top(file)]} - {top(file)}
    assert not wrong, f"{file.name} imports {wrong}, which come after it"


def test_files_are_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_functions_are_short():
    lengths = sorted(length for _, length, _ in functions())
    assert statistics.median(lengths) <= 10
    assert lengths[int(0.95 * len(lengths))] <= 35
