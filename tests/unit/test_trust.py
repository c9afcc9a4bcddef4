"""A recipe names trusted code only, and nothing else is imported."""

import sys

import pytest

from distill.errors import UserError
from distill.recipe import targets, trust


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project in the current directory, and a package outside of it."""
    inside, outside = tmp_path / "project", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [str(inside), str(outside), *sys.path])
    (outside / "foreign.py").write_text("raise SystemExit('imported')\n\nclass Mine: ...\n")
    yield inside
    for name in ("foreign", "mine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "subprocess.Popen",
        "importlib.import_module",
        "transformers.AutoModel",
        "hydra.utils.call",
        "foreign.Mine",
    ],
)
def test_other_modules_are_refused_before_they_are_imported(path, project):
    with pytest.raises(UserError, match=rf"{path.rpartition('.')[0]}.*trust="):
        targets.import_object(path)


def test_an_import_in_the_project_does_not_open_another_module(project):
    (project / "mine.py").write_text("from os import system as Mine\nfrom os import path\n")
    for name in ("Mine", "path.join"):
        with pytest.raises(UserError):
            targets.import_object(f"mine.{name}")


def test_an_assignment_in_the_project_does_not_open_another_module(project):
    (project / "mine.py").write_text("import os\n\nMine = os.system\n")
    with pytest.raises(UserError, match="os"):
        targets.import_object("mine.Mine")


def test_environments_in_the_project_are_not_part_of_it(project, monkeypatch):
    installed = project / ".venv" / "lib" / "python3.11" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "mine.py").write_text("class Mine: ...\n")
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(UserError, match="trust=mine"):
        targets.import_object("mine.Mine")


def test_the_user_trusts_a_module_by_the_command_line_or_the_environment(project, monkeypatch):
    (project.parent / "elsewhere" / "foreign.py").write_text("class Mine: ...\n")
    assert trust.take_from_arguments(["recipe=x", "trust=foreign"]) == ["recipe=x"]
    assert targets.import_object("foreign.Mine").__name__ == "Mine"
    monkeypatch.setenv(trust.VARIABLE, "another, foreign")
    assert targets.import_object("foreign.Mine").__name__ == "Mine"


def test_the_project_and_the_libraries_are_trusted(project):
    (project / "mine.py").write_text("class Mine: ...\n")
    assert targets.import_object("mine.Mine").__name__ == "Mine"
    assert targets.import_object("distill.tasks.Regression").__name__ == "Regression"
    path = "lightning.pytorch.callbacks.EarlyStopping"
    assert targets.import_object(path).__name__ == "EarlyStopping"


@pytest.mark.parametrize("text", ["def broken(:\n", "\x00", "1 +\n"])
def test_a_module_that_cannot_be_parsed_is_one_sentence(text, project):
    (project / "mine.py").write_text(text)
    with pytest.raises(UserError, match=r"mine\.py"):
        targets.import_object("mine.Mine")


def test_a_module_that_raises_is_named_with_its_line(project):
    (project / "mine.py").write_text("class Mine: ...\n\nraise KeyError('here')\n")
    with pytest.raises(UserError, match=r"KeyError.*mine\.py, line 3"):
        targets.import_object("mine.Mine")
