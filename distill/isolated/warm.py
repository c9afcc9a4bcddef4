"""A process that has imported torch and transformers, and runs each request in a fork of itself.

A fork has its own memory, and no modules besides those that its script would import first. So the
time of these imports is spent once, and beside other work, instead of once for each request.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Scripts that import torch and transformers in any case.
SCRIPTS = (
    "time_models",
    "model_memory",
    "time_generation",
    "generation_memory",
    "transformers_proof",
)
# Otherwise counting the GPUs would initialize CUDA, which then fails in forks.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class WarmProcess:
    """Starts at once and imports in the background.

    Args:
        command: Arguments of Python; the name of a file with the settings is added.
        environment: Environment of the process.
        settings: What it imports, as JSON values.
        threads: CPU threads of every request.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        settings: dict[str, Any],
        threads: int,
    ) -> None:
        self.threads = threads
        self.folder = TemporaryDirectory()
        self._folder = os.open(self.folder.name, os.O_RDONLY)
        # A socket's path has at most 107 characters, and that of the folder may have more.
        self.address = f"/proc/self/fd/{self._folder}/socket"
        file = Path(self.folder.name, "settings.json")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            file.write_text(json.dumps(settings | {"listener": listener.fileno()}))
            self.process = subprocess.Popen(
                [*command, str(file)],
                cwd=self.folder.name,
                env=environment | ENVIRONMENT,
                stdin=subprocess.PIPE,  # the process ends when this end of the pipe is closed
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )

    def run_script(self, script: str, request: Path, response: Path) -> bool:
        """Run a script in a fork, in the folder of its request; whether it succeeded."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(self.address)
                connection.sendall(json.dumps([script, str(request), str(response)]).encode())
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(1) == b"0" and response.is_file()
        except OSError:
            return False

    def close(self) -> None:
        """End the process, which may still be importing."""
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        os.close(self._folder)
        self.folder.cleanup()


_current: list[WarmProcess] = []


def current(script: str, threads: int) -> WarmProcess | None:
    """The process that can run a script with these threads, if there is one."""
    usable = script in SCRIPTS and _current and _current[-1].threads == threads
    return _current[-1] if usable else None


@contextmanager
def keep(process: WarmProcess | None) -> Iterator[None]:
    """Use a process inside the context; None: each request starts its own."""
    if process is None:
        yield
        return
    _current.append(process)
    try:
        yield
    finally:
        _current.remove(process)
        process.close()


def is_supported() -> bool:
    """Whether a process can be forked after it has imported torch."""
    return sys.platform == "linux" and hasattr(os, "fork")
