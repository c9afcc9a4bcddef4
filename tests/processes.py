"""A function of the tests on several ranks at once, each a process of its own that joins the others as a run's ranks do.

python -m tests.processes MODULE:FUNCTION FOLDER    (one rank; its environment says which)
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch

from distill.processes import launch, ranks
from distill.recipe import config

ROOT = Path(__file__).parents[1]


def on_ranks(function, folder, world, timeout=300):
    """What FUNCTION(FOLDER) returns on each rank: tensors, numbers, strings, and lists and dicts of them."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch._free_port()),
    }
    where["PYTHONPATH"] = f"{ROOT}:{Path(inspect.getfile(function)).parent}"
    command = [
        sys.executable,
        "-m",
        "tests.processes",
        f"{function.__module__}:{function.__name__}",
        str(folder),
    ]
    environments = [
        os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)
    ]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=each, stderr=subprocess.PIPE, text=True)
        for each in environments
    ]
    try:
        said = [process.communicate(timeout=timeout)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(
        text[-3000:] for text in said
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def main():
    (module, _, name), folder = sys.argv[1].partition(":"), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks.join_process_group(config.Trainer(accelerator="cpu"))
    answer = getattr(importlib.import_module(module), name)(folder)
    torch.save(answer, folder / f"rank{ranks.rank()}.pt")
    ranks.leave_process_group()


if __name__ == "__main__":
    launch.run_and_exit(main)
