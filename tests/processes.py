"""Runs a function of the tests on several ranks, each in its own process.

python -m tests.processes MODULE:FUNCTION FOLDER    (one rank; its environment says which)
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from distill.processes import exits, group, ranks
from distill.recipe import config

ROOT = Path(__file__).parents[1]


def on_ranks(function, folder, world, timeout=300):
    """What `function(folder)` returns on each of `world` ranks.

    It may return tensors, numbers, strings, and lists and dictionaries of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    paths = [str(ROOT), str(Path(inspect.getfile(function)).parent), os.environ.get("PYTHONPATH")]
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [
        sys.executable,
        "-m",
        "tests.processes",
        f"{function.__module__}:{function.__name__}",
        str(folder),
    ]
    environments = [
        os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)
    ]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=each, stderr=subprocess.PIPE, text=True)
        for each in environments
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(
        text[-3000:] for text in errors
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def main():
    (module, _, name), folder = sys.argv[1].partition(":"), Path(sys.argv[2])
    torch.set_num_threads(1)
    group.join_process_group(config.Trainer(accelerator="cpu"))
    result = getattr(importlib.import_module(module), name)(folder)
    torch.save(result, folder / f"rank{ranks.rank()}.pt")
    group.leave_process_group()


if __name__ == "__main__":
    exits.run_and_exit(main)
