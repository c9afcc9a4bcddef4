"""What is computed once and used again, addressed by its ingredients: another ingredient is another entry.

An entry is a folder with a manifest of SHA-256 checksums. It is written under a temporary name and renamed when whole; one
whose files differ from its manifest is never used.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def root() -> Path:
    """DISTILL_CACHE, or ~/.cache/distill."""
    return Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distill")


def entry(kind: str, ingredients: dict[str, Any]) -> Path:
    """The folder in which something made of exactly these ingredients is, or will be."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return root() / kind / hashlib.sha256(text.encode()).hexdigest()[:32]


def intact(folder: Path) -> bool:
    """Whether an entry is there and every file is as it was written."""
    if not folder.is_dir():
        return False
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        damaged = [name for name, checksum in manifest.items() if sha256(folder / name) != checksum]
    except (OSError, ValueError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("%s is damaged (%s): it is made again", folder, ", ".join(damaged))
    return not damaged


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes its name only when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-", ignore_cleanup_errors=True) as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        manifest = {str(file.relative_to(inside)): sha256(file) for file in sorted(inside.rglob("*")) if file.is_file()}
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        inside.replace(folder)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """The same files under a second name: hard links where the file system has them, copies elsewhere."""
    for file in (file for file in source.rglob("*") if file.is_file()):
        name = target / file.relative_to(source)
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        try:
            os.link(file, name)
        except OSError:
            shutil.copy2(file, name)
