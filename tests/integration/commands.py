"""Runs the commands in processes, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module, *arguments, cwd, **environment):
    """Start `python -m distill.MODULE` with these arguments."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "HYDRA_FULL_ERROR": "0"} | environment
    command = [sys.executable, "-m", f"distill.{module}", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(module, *arguments, cwd, **environment):
    """Run a command to its end. Returns its exit code, stdout and stderr."""
    process = start(module, *arguments, cwd=cwd, **environment)
    out, err = process.communicate()
    return process.returncode, out, err


def assert_one_sentence(err, *words):
    """Check that the last line is an error with these words, and that there is no traceback."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("distill: ")
    assert all(word in line for word in words), line


def run_folders(cwd):
    return [file.parent for file in sorted(Path(cwd).glob("runs/*/*/recipe.yaml"))]
