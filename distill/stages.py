"""The named stages of a run, in the terminal and in its log: which one is under way, and how long each took."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


def watched(progress: bool) -> bool:
    """Whether progress is wanted, and somebody may be looking: it is drawn on terminals alone."""
    return progress and sys.stdout.isatty()


class Stages:
    """Wall times in seconds by stage, filled as the stages end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        log.info("── %s %s", name, "─" * (60 - len(name)))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        log.info("%s took %.1f s", name, self.seconds[name])
