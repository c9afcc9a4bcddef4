"""The named stages of a run, in the terminal and in its log: which one is under way, how long each took, which are done."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill import store

log = logging.getLogger(__name__)

PROGRESS = "progress.json"


def show_progress(progress: bool) -> bool:
    """Whether progress is wanted, and somebody may be looking: it is drawn on terminals alone."""
    return progress and sys.stdout.isatty()


class Stages:
    """Which stages of a run folder are done, with their wall times in seconds and what they found; kept in `progress.json`.

    What a killed run had done is done. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.file = None if folder is None else folder / PROGRESS
        self.writes = writes
        told = _read(self.file)
        self.seconds: dict[str, float] = told.get("seconds", {})
        self.results: dict[str, Any] = told.get("found", {})
        self.finished: bool = told.get("finished", False)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        log.info("── %s %s", name, "─" * (60 - len(name)))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        log.info("%s took %.1f s", name, self.seconds[name])
        self._write()

    def done(self, name: str) -> bool:
        return name in self.seconds

    def again(self, names: Iterable[str]) -> None:
        """These stages are not done any more; written down when the next one is."""
        self.seconds = {
            name: seconds for name, seconds in self.seconds.items() if name not in names
        }
        self.finished = False

    def finish(self) -> None:
        """Nothing is left to do."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        if self.file is not None and self.writes:
            told = {"seconds": self.seconds, "found": self.results, "finished": self.finished}
            store.write_file(self.file, (json.dumps(told, indent=1) + "\n").encode())


def _read(file: Path | None) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        return told if isinstance(told, dict) else {}
    except ValueError as error:
        log.warning("%s is damaged (%s): the stages after the teacher are done again", file, error)
        return {}
