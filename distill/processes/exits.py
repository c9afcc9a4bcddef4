"""Ends a rank with its launcher, reports failures and sets exit codes.

It does not import torch, so that a command with bad input fails fast.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill import internals
from distill.errors import UserError
from distill.recipe.references import hide

__all__ = [
    "ERROR_FILE",
    "LAUNCHER_PID",
    "SHOW_TRACEBACK",
    "exit_on_error",
    "exit_with_launcher",
    "report_failure",
    "run_and_exit",
]

# environment variables of a rank
LAUNCHER_PID = "DISTILL_LAUNCHER_PID"  # set by `distill.processes.launch`
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by elastic, and so by torchrun
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
_POLL_SECONDS = 0.5


def exit_with_launcher() -> None:
    """Kill this rank and the processes that it started as soon as its launcher ends.

    Does nothing in a process that `distill.processes.launch` did not start.
    """
    if LAUNCHER_PID not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER_PID])

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="exit_with_launcher").start()


def report_failure(message: str) -> None:
    """Print why this command fails; in a rank, pass the message to the launcher, which prints it.

    Call it where the exception is handled: the error file of a rank gets its traceback.

    Args:
        message: One sentence without a line break, ``<thing> is <value>, but <rule>: <way out>``.
    """
    message = hide(message)
    _record(UserError(message))
    if LAUNCHER_PID not in os.environ:
        print(f"distill: {message}", file=sys.stderr)


def run_and_exit(main: Callable[[], None]) -> None:
    """Call `main`; a rank then exits without Python's shutdown.

    A gloo thread that frees its last tensor during the shutdown would abort the process after its
    work is done.
    """
    with exit_on_error():
        main()
    if _is_rank():
        _exit(0)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Record an exception from the block for the launcher, and end the rank.

    Commands that a framework calls use it to exit before the framework prints the exception.
    """
    try:
        yield
    except SystemExit as exit:
        if not _is_rank():
            raise
        _exit(exit.code)
    except BaseException as error:
        if not _is_rank():
            raise
        _record(error)
        if LAUNCHER_PID not in os.environ:
            sys.excepthook(type(error), error, error.__traceback__)
        _exit(1)


def _is_rank() -> bool:
    return "RANK" in os.environ


def _record(error: BaseException) -> None:
    """Write the error file as elastic's ErrorHandler does, without importing torch."""
    if file := os.environ.get(ERROR_FILE):
        extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
        with suppress(OSError):  # the message is printed too
            Path(file).write_text(json.dumps({"message": message}))


def _exit(code: Any) -> None:
    """Run exit functions, flush streams and exit, without Python's shutdown."""
    internals.run_exit_functions()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
