"""`trainer.devices=2` on the command line of one machine: a process per device, started together and ended together.

torchrun and srun start processes themselves; then there is nothing to do here. The process that the user started computes
nothing. It passes signals on, shows what the first rank prints, and ends with the exit code and the sentence of the rank that
failed first. Ranks notice its death by their stdin, which closes.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill import cli
from distill.errors import UserError
from distill.processes import signals
from distill.recipe import compose
from distill.recipe.config import Trainer

ARGUMENTS = list(sys.argv[1:])  # as the user gave them
FOLLOWS = "DISTILL_FOLLOWS"  # in the environment of a rank whose stdin is held open from here
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR"
}  # warnings of DDP, which is told to expect parts of a model that go unused
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ORDERLY = (75, 130)  # exit codes of runs that were asked to stop and saved what they had
GRACE, ORDERLY_GRACE = 3.0, 120.0  # seconds that the others have to end by themselves
FAILURE = re.compile(
    r"(\[rank\d+\]: ?)?(Traceback \(most|Error executing job|distill: )"
)  # begins what a process says of its end
ERROR = re.compile(
    r"(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception)\b.*)"
)  # the line of a traceback that says what went wrong
KEPT = 200  # lines of a rank's stderr


def processes_to_start(settings: Trainer) -> int:
    """How many processes are to be started here: none where torchrun or srun has done so, or where one process is all."""
    started = "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    if started or settings.devices * settings.nodes == 1:
        return 0
    if settings.nodes > 1:
        raise UserError(
            f"trainer.nodes is {settings.nodes}, but nobody can start processes on other machines from here: use torchrun or srun"
        )
    return settings.devices


def launch(module: str, folder: Path, count: int) -> int:
    """Run this command as `count` ranks that share a run folder. Returns the exit code, and has said what went wrong."""
    port = str(_free_port())
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        FOLLOWS: "1",
    }
    environment = (
        QUIET | os.environ | shared | {"HYDRA_FULL_ERROR": "1" if cli.SHOW_TRACEBACK else "0"}
    )
    command = [
        sys.executable,
        "-m",
        module,
        *ARGUMENTS,
        f"hydra.run.dir={compose.quote_override(str(folder))}",
    ]
    ranks: list[Rank] = []
    with _passing_on(ranks) as asked:
        try:
            for number in range(count):
                if asked:  # before all were there, and none has done anything
                    return _as_asked(asked[0])
                ranks.append(Rank(number, command, environment))
            _wait(ranks)
        finally:
            for rank in ranks:
                rank.end()
    return _verdict(ranks, folder, asked)


def exit_with_parent() -> None:
    """In a rank: end with the process that started it, however that ended."""
    if os.environ.pop(FOLLOWS, None) is None:
        return

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written: it returns when the other end is gone
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="follow").start()


def run_and_exit(main: Callable[[], None]) -> None:
    """Do it; one of several processes then ends without taking Python down around the threads that served its connections.

    A thread of gloo that lets go of its last tensor meanwhile would end the process by SIGABRT, with everything done.
    """
    error: BaseException | None = None
    try:
        main()
    except BaseException as raised:  # noqa: BLE001  # whatever it is, the end is the same
        error = raised
    if "RANK" in os.environ:
        _leave(error)
    if error is not None:
        raise error


def _leave(error: BaseException | None) -> None:
    """End as Python does after this error, but at once."""
    code: Any = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


class Rank:
    """One process, in a process group of its own: Ctrl-C reaches it from here alone, and what it started can be ended with it."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        self.number, self.ended, self.stopped_here = number, 0.0, False
        self.said: deque[str] = deque(maxlen=KEPT)
        self.logged_rows: list[
            str
        ] = []  # of what should be shown, what may turn out to be another rank's fault
        self.since = 0.0  # when the last of it came
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command,
            env=own,
            stdin=subprocess.PIPE,
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._note_the_end)
        ]
        for thread in self.threads:
            thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if self.number > 0:
                continue
            if self.logged_rows or FAILURE.match(line):
                self.logged_rows.append(line)
                self.since = time.monotonic()
            else:
                show(line)

    def _note_the_end(self) -> None:
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # its group is still its own
        self.ended = time.monotonic()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind
        self.process.wait()

    @property
    def code(self) -> int | None:
        return self.process.returncode if self.ended else None

    def send(self, number: int) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def release(self) -> None:
        """Show what was held: who goes on has not failed."""
        if self.logged_rows and self.code is None and time.monotonic() - self.since > GRACE:
            show("".join(self.logged_rows))
            self.logged_rows.clear()

    def end(self) -> None:
        """At once, with all that it started."""
        if not self.ended:
            self.stopped_here = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for thread in self.threads:
            thread.join(timeout=GRACE)

    @property
    def answer(self) -> str | None:
        """The sentence that it ended with."""
        lines = [line for line in self.said if line.startswith("distill: ")]
        return lines[-1].strip() if lines else None


def show(text: str) -> None:
    """On stderr, as long as somebody reads it."""
    with suppress(BrokenPipeError):
        print(text, end="", file=sys.stderr, flush=True)


def _wait(ranks: list[Rank]) -> None:
    """Until all have ended, or until those that were to end after a failure had their time."""
    while any(rank.code is None for rank in ranks):
        time.sleep(0.05)
        ranks[0].release()
        failed = [rank for rank in ranks if rank.code]
        if failed:
            orderly = all(rank.code in ORDERLY for rank in failed)
            if time.monotonic() - min(rank.ended for rank in failed) > (
                ORDERLY_GRACE if orderly else GRACE
            ):
                return


def _verdict(ranks: list[Rank], folder: Path, asked: list[int]) -> int:
    """Show the sentence of the rank that failed first: one that has a sentence, before one that was killed, before a traceback.

    The others' ends are its consequence: their connection broke, or they were stopped here.
    """
    failed = [rank for rank in ranks if rank.code and not rank.stopped_here]
    if not failed:
        show("".join(ranks[0].logged_rows))
        return 0
    first = min(failed, key=lambda rank: (rank.answer is None, (rank.code or 0) > 0, rank.ended))
    assert first.code is not None
    if asked and first.answer is None:
        return _as_asked(asked[0])
    if cli.SHOW_TRACEBACK:
        show("".join(first.said if first.number else first.logged_rows))
    _note(first, folder)
    show(f"{first.answer or _account(first)}\n")
    return first.code if first.code > 0 else 128 - first.code


def _as_asked(number: int) -> int:
    """The end of ranks that a signal met before they could answer it."""
    said, code = signals.exit_status(number)
    show(f"distill: {said}: the same command begins the run, or goes on with it\n")
    return code


def _account(rank: Rank) -> str:
    """One sentence about a rank that ended without its own."""
    assert rank.code is not None
    if rank.code < 0:
        name = signal.Signals(-rank.code).name
        return f"distill: rank {rank.number} was ended by {name}, but a run needs all of its processes: see whether its memory ran out"
    errors = [found[1] for line in rank.said if (found := ERROR.match(line))]
    last = errors[-1] if errors else f"exit code {rank.code}"
    return f"distill: rank {rank.number} failed with {last}: this is a defect, and train.log or HYDRA_FULL_ERROR=1 shows where"


def _note(rank: Rank, folder: Path) -> None:
    """What a rank that failed without a sentence said last, for train.log."""
    if rank.answer is None and folder.is_dir():
        with (folder / "train.log").open("a") as stream:
            stream.write(
                f"rank {rank.number} ended with exit code {rank.code}:\n{''.join(rank.said)}"
            )


@contextmanager
def _passing_on(ranks: list[Rank]) -> Iterator[list[int]]:
    """Signals to this process, which it gives, are for the ranks; a third one ends them at once, should they hang."""
    asked: list[int] = []

    def handler(number: int, _: Any) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send(signal.SIGKILL if len(asked) > 2 else number)

    before = {number: signal.signal(number, handler) for number in PASSED_ON}
    try:
        yield asked
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
