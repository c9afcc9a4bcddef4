"""The command lines, called as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module, *arguments, cwd, **environment):
    """The command, running; the library is found as it was installed."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "HYDRA_FULL_ERROR": "0"} | environment
    command = [sys.executable, "-m", f"distill.{module}", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(module, *arguments, cwd, **environment):
    """The finished command: its exit code, stdout and stderr."""
    process = start(module, *arguments, cwd=cwd, **environment)
    out, err = process.communicate()
    return process.returncode, out, err


def assert_one_sentence(err, *words):
    """The last line is the answer, and nothing of Python shows."""
    assert "Traceback" not in err
    answer = err.strip().splitlines()[-1]
    assert answer.startswith("distill: ")
    assert all(word in answer for word in words), answer


def run_folders(cwd):
    return [file.parent for file in sorted(Path(cwd).glob("runs/*/*/recipe.yaml"))]
