"""Maps in docstrings are true, imports point one way, and lengths and words stay in their limits.

`python scripts/house.py` prints the values.
"""

import ast
import statistics
from importlib import import_module
from pathlib import Path

import pytest

import distill
from tests import measures

ROOT = Path(distill.__file__).parent
SOURCES = measures.read_package(ROOT)
FUNCTIONS = [function for source in SOURCES for function in source.functions]
# The files in packing/programs are texts for exports, which nothing imports.
PACKAGES = sorted({file.parent for file in ROOT.rglob("__init__.py")} - {ROOT / "packing/programs"})
TOP_LEVEL = {source.top for source in SOURCES} - {"__main__"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda folder: folder.name)
def test_the_map_lists_every_module(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False)
    assert measures.mapped_in(docstring or "") == measures.modules_in(package)


def test_the_order_of_imports_names_every_top_level_module():
    assert sorted(name for names in measures.IMPORT_ORDER for name in names) == sorted(TOP_LEVEL)


def test_imports_point_one_way():
    assert measures.imports_against_the_order(SOURCES) == []
    assert measures.import_cycles(SOURCES) == []


def test_module_names_are_unique():
    assert measures.shared_names(SOURCES) == {}


def test_there_are_few_top_level_modules():
    assert len([source for source in SOURCES if source.file.parent == ROOT]) <= 16


def test_public_names_are_importable_and_documented():
    for name in distill.__all__:
        public = getattr(distill, name)
        assert public.__name__ == name
        assert public.__doc__


@pytest.mark.parametrize(
    "package", sorted(ROOT.glob("*/__init__.py")), ids=lambda file: file.parent.name
)
def test_what_a_package_lists_as_public_is_there(package):
    module = import_module(f"distill.{package.parent.name}")
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_files_are_short():
    lengths = {source.name: len(source.lines) for source in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
    assert statistics.median(lengths.values()) <= 120


def test_functions_are_short():
    lengths = [function.lines for function in FUNCTIONS]
    assert statistics.median(lengths) <= 10
    assert measures.percentile(lengths, 0.95) <= 35


def test_functions_take_at_most_six_parameters():
    functions = [
        function
        for function in FUNCTIONS
        if not function.is_recipe_constructor and not function.is_kernel
    ]
    assert [str(function) for function in functions if len(function.parameters) > 6] == []


def test_few_functions_take_a_whole_run():
    taking = [str(function) for function in FUNCTIONS if function.takes_run]
    assert len(taking) <= 25, taking


def test_lines_are_short():
    assert measures.long_lines(SOURCES) == []


@pytest.mark.parametrize(
    "places", [measures.unwanted_names, measures.unwanted_words, measures.nulls]
)
def test_words_are_those_of_the_field(places):
    assert places(SOURCES) == []


def package_of(folder, **files):
    for name, text in files.items():
        file = folder / "package" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return measures.read_package(folder / "package")


def test_imports_in_functions_count_and_those_for_type_checkers_do_not(tmp_path):
    checked = "if TYPE_CHECKING:\n    from package import train\n"
    late = "def f():\n    from package.export.card import card\n    import package.cli\n"
    sources = package_of(tmp_path, errors=checked + late, export="from package import errors\n")
    assert measures.imports_against_the_order(sources) == [
        "errors.py:4 imports export",
        "errors.py:5 imports cli",
    ]
    assert measures.import_cycles(sources) == ["errors <-> export"]


def test_parameters_are_counted_as_a_caller_sees_them(tmp_path):
    text = "class C:\n    def f(self, a, /, b: config.Run, *rest, c: Runtime | None = None): ...\n"
    (function,) = package_of(tmp_path, tasks=text)[0].functions
    assert [each.arg for each in function.parameters] == ["a", "b", "c"]
    assert function.takes_run and function.owner == "C" and not function.is_recipe_constructor


def test_private_words_are_found_in_names_and_in_prose(tmp_path):
    text = 'def is_told(x):\n    """What it said, or null."""\n    found = x  # folder: "untold"\n'
    sources = package_of(tmp_path, data=text)
    assert measures.unwanted_names(sources) == ["data.py:1 is_told", "data.py:3 found"]
    assert measures.unwanted_words(sources) == ["data.py:2 said"]
    assert measures.nulls(sources) == ["data.py:2"]
