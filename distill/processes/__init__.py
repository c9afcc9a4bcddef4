"""One run as several processes.

    environment.py  the number of processes, from the recipe and environment variables
    launch.py       starts and supervises the ranks of one machine (torch.distributed.elastic)
    group.py        joins and leaves the process group
    ranks.py        the rank of this process; collectives over Python values and tensors
    strategy.py     the Lightning strategy: DDP or FSDP
    fsdp.py         models sharded over the ranks (FSDP2)
    signals.py      SIGTERM, SIGUSR1 and Ctrl-C as requests to stop
    exits.py        ends a rank with its launcher, reports failures, sets exit codes
    memory.py       keeps freed memory in the process during training

`environment`, `signals`, `exits` and `memory` import no torch. README.md describes clusters,
resuming and exit codes.
"""

from importlib import import_module
from types import ModuleType

__all__ = [
    "environment",
    "exits",
    "fsdp",
    "group",
    "launch",
    "memory",
    "ranks",
    "signals",
    "strategy",
]


def __getattr__(name: str) -> ModuleType:
    """Import a module on first use, because most of them import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return import_module(f"{__name__}.{name}")
