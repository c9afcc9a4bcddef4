"""`trainer.devices=2` on one machine: one process per device, by `torch.distributed.elastic`.

The launcher computes nothing. It forwards signals, shows the output of rank zero, and ends with the
exit code and the message of the rank that failed first. torchrun and srun start processes
themselves and need none of this.
"""

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    ProcessFailure,
    SignalException,
    Std,
    SubprocessContext,
)
from torch.distributed.elastic.utils.distributed import get_free_port

from distill.errors import UserError
from distill.processes import signals
from distill.processes.exits import LAUNCHER_PID, SHOW_TRACEBACK

__all__ = ["launch"]

_FORWARDED = (signal.SIGINT, *signals.STOP_SIGNALS)
_SAVED = (75, 130)  # exit codes of ranks that saved their state after a signal
_GRACE, _SAVE_GRACE = 3.0, 120.0  # seconds within which the other ranks end by themselves
_POLL_SECONDS = 0.05
_STDERR_LINES = 200  # of a failed rank, for the log
_REPORTED = f"{UserError.__name__}: "  # prefix of messages of `report_failure` in error files


def launch(module: str, arguments: list[str], count: int, log_file: Path) -> int:
    """Run ``python -m module arguments`` as `count` ranks on this machine and wait for their end.

    Args:
        module: Dotted name. It must call :func:`~distill.processes.exits.exit_with_launcher` and
            run its main by :func:`~distill.processes.exits.run_and_exit`.
        arguments: Command line of every rank.
        count: Number of ranks.
        log_file: Gets the traceback of a rank that failed without a message for the user.

    Returns:
        The exit code: that of the rank that failed first, whose message has been printed, or
        128 + N if signal N ended it. 0 if none failed.
    """
    # elastic would log the failure, which is printed here
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="distill-") as folder:
        ranks = _Ranks(
            name="distill",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(count), ("-m", module, *arguments)),
            envs=_environments(count),
            logs_specs=DefaultLogsSpecs(
                folder,
                redirects=dict.fromkeys(range(1, count), Std.ERR),
                local_ranks_filter={0},
            ),
        )
        try:
            ranks.start()  # until the next line a signal raises SignalException
            with signals.handle_signals(_FORWARDED, ranks.forward):
                result = ranks.wait(period=_POLL_SECONDS)
        except SignalException as request:
            signals.raise_stop(request.sigval)
        finally:
            ranks.close()
        assert result is not None
        failure = _first_failure([*result.failures.values()], ranks.killed)
        return 0 if failure is None else _report(failure, result.stderrs, ranks.requests, log_file)


class _Ranks(SubprocessContext):
    """Elastic's processes, with forwarded signals and time to end by themselves after a failure.

    Elastic sends SIGTERM to all ranks once one has failed. That would interrupt a rank that is
    saving, and stop the rank with the cause of the failure before it reports it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.requests: list[int] = []  # signals that were forwarded
        self.killed: set[int] = set()  # ranks that did not end by themselves

    def forward(self, number: int) -> None:
        """Send a signal to all ranks; the third one kills them."""
        self.requests.append(number)
        for process in self._running().values():
            process.send_signal(signal.SIGKILL if len(self.requests) > 2 else number)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Wait for ranks that are ending, then kill all and the processes that they started."""
        start = time.monotonic()
        while self._running() and time.monotonic() - start < self._grace():
            time.sleep(_POLL_SECONDS)
        self.killed |= self._running().keys()
        super().close(signal.SIGKILL, timeout)
        for pid in self.pids().values():  # each rank leads a process group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _grace(self) -> float:
        codes = [handler.proc.returncode for handler in self.subprocess_handlers.values()]
        failed = [code for code in codes if code]
        if not failed:
            return 0.0
        return _SAVE_GRACE if all(code in _SAVED for code in failed) else _GRACE

    def _running(self) -> dict[int, Popen[bytes]]:
        processes = {rank: handler.proc for rank, handler in self.subprocess_handlers.items()}
        return {rank: process for rank, process in processes.items() if process.poll() is None}


def _first_failure(failures: list[ProcessFailure], killed: set[int]) -> ProcessFailure | None:
    """A rank with a message, else one that a signal ended, else the earliest traceback.

    Tracebacks come last because a broken connection raises one in the other ranks too.
    """
    return min(
        (failure for failure in failures if failure.local_rank not in killed),
        key=lambda failure: (_message(failure) is None, failure.exitcode > 0, _time(failure)),
        default=None,
    )


def _environments(count: int) -> dict[int, dict[str, str]]:
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        LAUNCHER_PID: str(os.getpid()),
        "HYDRA_FULL_ERROR": str(int(SHOW_TRACEBACK)),  # `distill.cli` has overwritten the variable
        # DDP warns about unused parameters, which are allowed here
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    return {rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}


def _report(
    failure: ProcessFailure, stderrs: dict[int, str], requests: list[int], log_file: Path
) -> int:
    """Print the message of the first failure and return the exit code."""
    message = _message(failure)
    if message is None and requests:  # the signal came before the rank could handle it
        outcome, code = signals.exit_status(requests[0])
        message = f"{outcome}: the same command starts the run or continues it"
        print(f"distill: {message}", file=sys.stderr)
        return code
    if SHOW_TRACEBACK:
        print(_error(failure)[1], file=sys.stderr)
    if message is None and log_file.parent.is_dir():
        with log_file.open("a") as stream:
            stream.write(_details(failure, stderrs[failure.local_rank]))
    print(f"distill: {message or _describe(failure)}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _message(failure: ProcessFailure) -> str | None:
    """The rank's message for the user, None if it had none."""
    text = _error(failure)[0]
    return text.removeprefix(_REPORTED) if text.startswith(_REPORTED) else None


def _error(failure: ProcessFailure) -> tuple[str, str]:
    """The error that a rank recorded and its traceback, empty if it recorded none."""
    message = failure.error_file_data["message"]
    if not isinstance(message, dict):  # elastic's placeholder
        return "", ""
    return message["message"], message["extraInfo"]["py_callstack"]


def _describe(failure: ProcessFailure) -> str:
    """One sentence about a rank without a message for the user."""
    rank = failure.local_rank
    if failure.exitcode < 0:
        return (
            f"rank {rank} was ended by {failure.signal_name()}, but a run needs all of its "
            "processes: check whether the memory was sufficient"
        )
    error = _error(failure)[0].partition("\n")[0] or f"exit code {failure.exitcode}"
    return (
        f"rank {rank} failed with {error}: "
        "this is a defect, and train.log or HYDRA_FULL_ERROR=1 shows the traceback"
    )


def _details(failure: ProcessFailure, stderr: str) -> str:
    """The traceback of a rank and the end of its stderr, where that was redirected to a file."""
    lines = Path(stderr).read_text(errors="replace").splitlines() if stderr else []
    title = f"rank {failure.local_rank} ended with exit code {failure.exitcode}:"
    return "\n".join([title, *lines[-_STDERR_LINES:], _error(failure)[1]]) + "\n"


def _time(failure: ProcessFailure) -> float:
    """When the error was recorded; elastic's time stamp has no fraction of a second."""
    file = Path(failure.error_file)
    return file.stat().st_mtime if file.is_file() else float("inf")
