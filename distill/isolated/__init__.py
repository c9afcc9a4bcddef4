"""Run a script in a fresh process, which shares no modules and no memory with this one.

    python -I distill/isolated SCRIPT request.json response.json

is the command of the process (`__main__.py`). The scripts need only the standard library and what
they measure: torch and transformers, or a runtime.

Inside :func:`warm_process`, scripts that need torch and transformers run in forks of one process
that has imported both. What fails there is tried again in a fresh process.

| module | what it does |
|---|---|
| `warm.py` | the process that has imported torch, as its parent sees it |
| `fork_server.py` | its loop: a fork for each request |
| `scripts/` | the scripts: modules with one function, `run(request) -> response` |
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.isolated import warm

__all__ = ["ProcessError", "run_isolated", "warm_process"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
ERROR = re.compile(r"[\w.]+(Error|Exception|Exit): ")  # the last line of a traceback


class ProcessError(Exception):
    """The process ended without a response; the message is the error that it printed."""


def run_isolated(script: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run a script in a fresh process, in an empty folder and offline.

    Args:
        script: Name of a module in `scripts/`.
        request: Arguments of the script, as JSON values. `threads` is the number of CPU threads.
            Optional: `blocked`, packages that the process must not import, and `libraries`,
            packages whose versions the response holds as `versions`, and `online`, whether it may
            download from the Hugging Face Hub.

    Raises:
        ProcessError: if the script fails.

    Example:
        >>> run_isolated("model_memory", {"threads": 1, "folder": "runs/bert/student", ...})["cost"]
    """
    with tempfile.TemporaryDirectory() as folder:
        request_file, response_file = Path(folder, "request.json"), Path(folder, "response.json")
        request_file.write_text(json.dumps(request | {"packages": _package_folders()}))
        process = warm.current(script, request["threads"])
        if process is None or not process.run_script(script, request_file, response_file):
            environment = _environment(request["threads"], request.get("online", False))
            _run_fresh(script, request_file, response_file, environment)
        return json.loads(response_file.read_text())


def _run_fresh(script: str, request: Path, response: Path, environment: dict[str, str]) -> None:
    """Run a script in a new process, in the folder of its request."""
    process = subprocess.run(
        [*_command(), script, str(request), str(response)],
        cwd=request.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if process.returncode != 0 or not response.is_file():
        raise ProcessError(_error_message(process))


@contextmanager
def warm_process(auto_class: str, threads: int) -> Iterator[None]:
    """Start a process that imports torch and transformers, for the requests inside the context.

    Args:
        auto_class: Class of transformers that the requests load.
        threads: CPU threads of the requests.
    """
    process = None
    if warm.is_supported():
        settings = {"packages": _package_folders(), "auto_class": auto_class}
        command = [*_command(), "fork_server"]
        process = warm.WarmProcess(command, _environment(threads), settings, threads)
    with warm.keep(process):
        yield


def _command() -> list[str]:
    return [sys.executable, "-I", str(Path(__file__).resolve().parent)]


def _environment(threads: int, online: bool = False) -> dict[str, str]:
    settings = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    if online:
        del settings["HF_HUB_OFFLINE"]
    return os.environ | settings


def _package_folders() -> list[str]:
    """This process's `sys.path`; `-I` leaves out user installs and PYTHONPATH, for example."""
    return [str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).is_dir()]


def _error_message(process: subprocess.CompletedProcess[str]) -> str:
    if process.returncode < 0:
        return f"it was killed by signal {-process.returncode}"
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [
        line for line in lines if ERROR.match(line)
    ]  # some libraries print hints after the error
    return (errors or lines)[-1] if lines else f"exit code {process.returncode}"
