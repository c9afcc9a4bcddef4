"""The named stages of a run: logged, timed, and recorded as done in its folder."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill import store

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
PROOF = "proof.json"  # of an export: its `bytes` are those of the files that were proven
VERSION = 3  # of checkpoints: raise it when older ones can no longer be resumed


def show_progress(progress: bool) -> bool:
    """Whether to draw progress bars: on a terminal, if the recipe enables them."""
    return progress and sys.stdout.isatty()


# What a stage that is done has left in the run folder.
_FILES = {
    "student": Path("student", "config.json"),
    "evaluate": Path("metrics.json"),
    "export": Path("export", "README.md"),
}


def _is_complete(file: Path) -> bool:
    """Whether a file is there, with those that a manifest beside it lists or a proof measured."""
    folder = file.parent
    names: list[str] = []
    size = 0
    with suppress(OSError, ValueError):
        names = [*json.loads((folder / store.MANIFEST).read_text())]
    with suppress(OSError, ValueError, KeyError):
        size = json.loads((folder / PROOF).read_text())["bytes"]
    present = [each for each in folder.rglob("*") if each.is_file()]
    return (
        file.is_file()
        and all((folder / name).is_file() for name in names)
        and sum(each.stat().st_size for each in present) >= size
    )


class Stages:
    """The stages of a run that are done, with wall times and results, as stored in `progress.json`.

    Args:
        folder: The run folder, whose earlier progress is loaded. None stores no file.
        writes: Whether this process writes the file; one process of a run does.

    Attributes:
        seconds: Wall time of each stage that is done.
        results: Results that later stages and resumed runs need, as JSON values.
        finished: Whether the run is complete.
        version: Version of the run's checkpoints.

    Example::

        stage = Stages(folder)
        if not stage.done("data"):
            with stage("data"):
                ...
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.file = None if folder is None else folder / PROGRESS
        self.writes = writes
        progress = _read(self.file)
        self.seconds: dict[str, float] = progress.get("seconds", {})
        self.results: dict[str, Any] = progress.get("found", {})
        self.finished: bool = progress.get("finished", False)
        existed = self.file is not None and self.file.exists()
        self.version: int = progress.get("version", 1 if existed else VERSION)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Log and time a stage, and record it as done at the end of the block."""
        log.info("── %s %s", name, "─" * (60 - len(name)))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        log.info("%s took %.1f s", name, self.seconds[name])
        self._write()

    def done(self, name: str) -> bool:
        """Whether a stage is done."""
        return name in self.seconds

    def again(self, names: Iterable[str]) -> None:
        """Mark stages as not done; the file changes when the next stage is done."""
        self.seconds = {
            name: seconds for name, seconds in self.seconds.items() if name not in names
        }
        self.finished = False

    def lost(self, folder: Path, exports: bool) -> list[str]:
        """The stages that are done, but whose files somebody has removed since.

        Args:
            folder: The run folder.
            exports: Whether the recipe has an export.
        """
        expected = {name: file for name, file in _FILES.items() if exports or name != "export"}
        return [
            name
            for name, file in expected.items()
            if self.done(name) and not _is_complete(folder / file)
        ]

    def finish(self) -> None:
        """Mark the run as complete."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        if self.file is not None and self.writes:
            progress = {
                "version": self.version,
                "seconds": self.seconds,
                "found": self.results,
                "finished": self.finished,
            }
            store.write_file(self.file, (json.dumps(progress, indent=1) + "\n").encode())


def _read(file: Path | None) -> dict[str, Any]:
    try:
        progress = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    except ValueError as error:
        log.warning("%s is damaged (%s): the stages after the teacher are repeated", file, error)
        return {}
    return progress if isinstance(progress, dict) else {}
