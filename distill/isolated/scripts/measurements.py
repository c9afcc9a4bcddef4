"""Wall times, percentiles, peak memory, and a description of the machine."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Untimed calls of each model, with the first of its inputs, before the timed ones.
WARM_UP = {"requests": 10, "batches": 2}
# Consecutive calls of a model: as on a server, its weights are then in the processor's cache.
TURN = {"requests": 10, "batches": 1}


def interleave(
    calls: Mapping[str, Sequence[Callable[[], Any]]], warm_up: int = 0, turn: int = 1
) -> dict[str, list[float]]:
    """Time the calls of several models, which take turns: a busy machine slows them all alike.

    Args:
        calls: The same number of calls for each model.
        warm_up: First calls of each model that also run untimed, at the beginning.
        turn: Consecutive calls of one model. The order of the models is reversed after each round.

    Returns:
        The seconds of each model's calls.
    """
    for calls_of_model in calls.values():
        for call in calls_of_model[:warm_up]:
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for first in range(0, len(calls[names[0]]), turn):
        for name in names:
            seconds[name] += [_seconds(call) for call in calls[name][first : first + turn]]
        names.reverse()
    return seconds


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def latency(seconds: list[float]) -> dict[str, float]:
    """Percentiles, in milliseconds."""
    import numpy as np

    return {
        f"latency_p{percent}_ms": 1000 * float(np.percentile(seconds, percent))
        for percent in (50, 90, 99)
    }


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes.

    Linux keeps `ru_maxrss` across exec, so that a child of a large process would report its
    parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(request: dict[str, Any], requests: int, batches: int) -> dict[str, Any]:
    """The machine, versions and settings of a measurement of these numbers of calls."""
    import torch
    import transformers

    on_gpu = request["device"] != "cpu"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": request["threads"],
        "dtype": request["dtype"],
        "attention": request["attention"],
        "warm_up": WARM_UP,
        "turn": TURN,
        "requests": requests,
        "batches": batches,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
