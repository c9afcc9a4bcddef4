"""The files that CONTRIBUTING and the READMEs of tests and scripts name and link exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [".github/CONTRIBUTING.md", "tests/README.md", "scripts/README.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    document = ROOT / name
    names = re.findall(r"`([\w./]+(?:\.py|\.sh|\.yaml|\.toml|/))[`\s]", document.read_text())
    folders = (ROOT, document.parent)
    paths = [each for each in names if not any((folder / each).exists() for folder in folders)]
    assert names and paths == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_point_to_files(name):
    document = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_script_and_helper_is_described():
    for folder in (ROOT / "scripts", ROOT / "tests"):
        text = (folder / "README.md").read_text()
        files = [file.name for file in folder.glob("*.*") if file.suffix in (".py", ".sh")]
        missing = [name for name in files if name not in ("__init__.py",) and name not in text]
        assert [name for name in missing if not name.startswith("test_")] == []
