"""Signals that ask a run to stop: Ctrl-C, and SIGTERM and SIGUSR1, which schedulers send.

Most of a run stops at once. Training stops between two steps, after its state is saved.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = [
    "STOP_SIGNALS",
    "StopRequested",
    "StopRequests",
    "defer_stop_signals",
    "exit_status",
    "handle_signals",
    "raise_on_stop_signals",
    "raise_stop",
]

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """A signal that stops the run has arrived.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequests:
    """The latest signal that arrived inside :func:`defer_stop_signals`.

    Attributes:
        number: The signal, 0 if none has arrived.
    """

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int) -> None:
        """Store a signal; a second Ctrl-C raises KeyboardInterrupt at once."""
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number  # first, because logging may fail inside a signal handler
        log.warning(
            "%s: finishing the current step and saving before stopping",
            signal.Signals(number).name,
        )


def exit_status(number: int) -> tuple[str, int]:
    """How a signal ended the run, for a message, and the exit code: 130 after Ctrl-C, else 75."""
    if number == signal.SIGINT:
        return "interrupted", 130
    return f"ended by {signal.Signals(number).name}", 75


def raise_stop(number: int) -> None:
    """Raise the exception of a signal: KeyboardInterrupt for Ctrl-C, StopRequested otherwise."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise StopRequested(number)


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Raise StopRequested inside the block on SIGTERM or SIGUSR1; Ctrl-C is not affected."""
    with handle_signals(STOP_SIGNALS, raise_stop):
        yield


@contextmanager
def defer_stop_signals() -> Iterator[StopRequests]:
    """Store SIGTERM, SIGUSR1 and Ctrl-C; the end of the block raises the latest one.

    Example::

        with defer_stop_signals() as requests:
            while not requests.number:
                step()
    """
    requests = StopRequests()
    with handle_signals((*STOP_SIGNALS, signal.SIGINT), requests.note):
        yield requests
    if requests.number:
        raise_stop(requests.number)


@contextmanager
def handle_signals(numbers: Sequence[int], handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each of these signals that arrives inside the block.

    Does nothing outside the main thread, because only that can handle signals. In forked processes,
    such as those of a DataLoader, SIGTERM and SIGUSR1 have their default effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def handler(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            handle(number)
        elif number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
