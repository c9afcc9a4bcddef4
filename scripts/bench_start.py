"""Seconds until the command responds: help, a misspelt key, refused recipes, the first optimizer
step.

    python scripts/bench_start.py [recipe=bert_to_distil] [rounds=5] [key=value ...]

Each measurement is the command in a new process, wall time from its start; they are interleaved,
and the median counts. One run beforehand, which is not timed, fills the store with teacher and
cache. A callback prints the time of the first step and ends the process.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

MARK = "first step at "


class FirstStep(Callback):
    """Prints the time after the first optimizer step, and ends the process."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step:
            print(f"{MARK}{time.time()}", flush=True)
            os._exit(0)


def main() -> None:
    from benchmark import conditions, interleave, options, table

    settings, changes = options({"rounds": 5})
    recipe = [f"{key}={value}" for key, value in ({"recipe": "bert_to_distil"} | changes).items()]
    first = [*recipe, "callbacks.first_step._target_=bench_start.FirstStep"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        os.environ |= {
            "DISTILL_CACHE": str(folder / "store"),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        call(first, folder / "fill")
        commands = {  # row -> function, goal in seconds
            "--help": (lambda: call(["--help"]), 1),
            "a misspelt key": (lambda: call([*recipe, "optimizer.lrr=1"]), 1),
            "a value out of range": (lambda: call([*recipe, "loss.alpha=2"]), 1),
            "conflicting keys": (lambda: call([*recipe, "trainer.accumulate=4096"]), 1),
            "the first optimizer step": (lambda: call(first, tempfile.mkdtemp(dir=folder)), 15),
        }
        ways = {name: way for name, (way, _) in commands.items()}
        medians = interleave(ways, settings["rounds"])
    rows = [[name, f"{medians[name]:.2f}", f"< {goal}"] for name, (_, goal) in commands.items()]
    print(table(["", "seconds", "goal"], rows))
    print(f"\nMedians of {settings['rounds']} rounds. {conditions()}")


def call(arguments: list[str], folder: Path | str | None = None) -> float:
    """Seconds until the command has ended; with a run folder, until its first step."""
    command = [sys.executable, "-m", "distill.train", *arguments]
    if folder is not None:
        command.append(f"hydra.run.dir={folder}")
    began = time.time()
    process = subprocess.run(command, capture_output=True, text=True)
    ended = time.time()
    if folder is None:
        return ended - began
    marks = [line for line in process.stdout.splitlines() if line.startswith(MARK)]
    if not marks:
        sys.exit(f"{' '.join(command)} ended before its first step:\n{process.stderr[-3000:]}")
    return float(marks[0].removeprefix(MARK)) - began


if __name__ == "__main__":
    main()
