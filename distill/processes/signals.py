"""Requests to end: SIGTERM and SIGUSR1, which schedulers send before they take a machine away, and Ctrl-C.

Most of a run ends at once. Training notes the request, and ends between two steps, when its state is saved.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """The run was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(number: int) -> tuple[str, int]:
    """What is said of a run that ended as it was asked to, and its exit code."""
    return (
        ("interrupted", 130)
        if number == signal.SIGINT
        else (f"ended by {signal.Signals(number).name}", 75)
    )


class StopRequests:
    """What was asked for while requests are only noted; 0 is nothing."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt  # who asks twice does not want to wait
        self.number = number  # before anything that may go wrong in the middle of another line
        log.warning(
            "%s: the step under way is finished and saved first", signal.Signals(number).name
        )


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise Asked where the run is; Ctrl-C is Python's own."""
    with _handled(STOP_SIGNALS, _raise):
        yield


@contextmanager
def defer_stop_signals() -> Iterator[StopRequests]:
    """Inside, requests are noted for somebody to look at; one that is still open at the end is raised then."""
    requests = StopRequests()
    with _handled((*STOP_SIGNALS, signal.SIGINT), requests.note):
        yield requests
    if requests.number:
        _raise(requests.number)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise StopRequested(number)


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], answer: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    process = os.getpid()

    def handler(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            answer(number)
        elif number != signal.SIGINT:  # a process that loads data ends as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
