"""How long one waits for an answer: help, a typo, a refused recipe, and the first optimizer step with teacher and cache in the store.

    python scripts/bench_start.py [recipe=bert_to_distil] [rounds=5] [key=value ...]

Each is the command itself in a process of its own, by the clock from its start; they take turns, and the median counts. A run that
is not timed fills the store first. The first step is told by a callback, which then ends the process.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


class FirstStep(Callback):
    """Says when the first optimizer step is over, and ends the process."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step:
            print(f"first step at {time.time()}", flush=True)
            os._exit(0)


def main() -> None:
    from measured import conditions, options, table, turns

    own, changes = options({"rounds": 5})
    recipe = [f"{key}={value}" for key, value in ({"recipe": "bert_to_distil"} | changes).items()]
    first = [*recipe, "callbacks.first_step._target_=bench_start.FirstStep"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"DISTILL_CACHE": str(folder / "store")}
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        )
        called(first, folder / "filling")
        ways = {
            "--help": lambda: called(["--help"], None),
            "a misspelt key": lambda: called([*recipe, "optimizer.lrr=1"], None),
            "a value out of range": lambda: called([*recipe, "loss.alpha=2"], None),
            "keys that do not go together": lambda: called(
                [*recipe, "trainer.accumulate=4096"], None
            ),
            "the first optimizer step": lambda: called(first, Path(tempfile.mkdtemp(dir=folder))),
        }
        found = turns(ways, own["rounds"])
    goals = [1, 1, 1, 1, 15]
    rows = [
        [name, f"{seconds:.2f}", f"< {goal}"]
        for (name, seconds), goal in zip(found.items(), goals, strict=True)
    ]
    print(table(["", "seconds", "goal"], rows))
    print(f"\nMedians of {own['rounds']} rounds. {conditions()}")


def called(arguments: list[str], folder: Path | None) -> float:
    """Seconds until the command has answered, or until its first step where it runs in a folder."""
    command = [
        sys.executable,
        "-m",
        "distill.train",
        *arguments,
        *([f"hydra.run.dir={folder}"] if folder else []),
    ]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    ended = time.time()
    if folder is None:
        return ended - began
    told = [line for line in done.stdout.splitlines() if line.startswith("first step at ")]
    if not told:
        sys.exit(f"{' '.join(command)} came to no step:\n{done.stderr[-3000:]}")
    return float(told[0].rpartition(" ")[2]) - began


if __name__ == "__main__":
    main()
