"""A question answered by a script in a fresh process that has nothing of this one: no modules, no memory, no library of ours.

The script is a file run by its path. It reads its question from one JSON file and writes its answer to another, so that
whatever libraries print does no harm.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


ERROR = re.compile(r"[\w.]+(Error|Exception|Exit): ")


class ProcessError(Exception):
    """The script ended without an answer; the message is the last thing that it said."""


def run_isolated(script: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Run `script` in isolation, in an empty folder and without a network, and return its answer."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "question.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(question | {"packages": _packages()}))
        threads = {"OMP_NUM_THREADS": str(question["threads"])}
        command = [sys.executable, "-I", str(script.resolve()), str(asked), str(answered)]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | QUIET | threads,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0 or not answered.is_file():
            raise ProcessError(_last_words(done))
        return json.loads(answered.read_text())


def _packages() -> list[str]:
    """Where this process finds its packages: isolation (`-I`) leaves out user installs and PYTHONPATH, which may hold torch."""
    return [str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).is_dir()]


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it was killed by signal {-done.returncode}"
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if ERROR.match(line)]  # some libraries go on with advice
    return (errors or said)[-1] if said else f"exit code {done.returncode}"
