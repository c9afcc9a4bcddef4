"""Run a script in a fresh process, which shares no modules and no memory with this one.

    python -I distill/isolated SCRIPT request.json response.json

is the command of the process (`__main__.py`). The scripts need only the standard library and what
they measure: torch and transformers, or a runtime.

| module | what it does |
|---|---|
| `scripts/` | the scripts: modules with one function, `run(request) -> response` |
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["ProcessError", "run_isolated"]

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
            packages whose versions the response holds as `versions`.

    Raises:
        ProcessError: if the script fails.

    Example:
        >>> run_isolated("model_memory", {"threads": 1, "folder": "runs/bert/student", ...})["cost"]
    """
    with tempfile.TemporaryDirectory() as folder:
        request_file, response_file = Path(folder, "request.json"), Path(folder, "response.json")
        request_file.write_text(json.dumps(request | {"packages": _package_folders()}))
        here = str(Path(__file__).resolve().parent)
        command = [sys.executable, "-I", here, script, str(request_file), str(response_file)]
        process = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(request["threads"])},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if process.returncode != 0 or not response_file.is_file():
            raise ProcessError(_error_message(process))
        return json.loads(response_file.read_text())


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
