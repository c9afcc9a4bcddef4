"""Shared by the benchmarks: changed recipes, interleaved timing, Markdown tables, the machine."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from distill import cli, training
from distill.recipe import compose, config

os.environ |= cli.ENVIRONMENT | os.environ  # the environment of the commands
QUIET = {"tracking.wandb": "disabled", "trainer.progress": False}


def options(defaults: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the `key=value` arguments into the script's own, converted to their defaults' types,
    and the recipe's.
    """
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    settings = {name: type(value)(arguments.pop(name, value)) for name, value in defaults.items()}
    return settings, arguments


def compose_run(changes: dict[str, Any]) -> config.Run:
    """The recipe that the key `recipe` names, with the other keys applied to it."""
    file = compose.available_recipes()[changes.get("recipe", "bert_to_distil")]
    lines = [f"{key}={value}" for key, value in (QUIET | changes).items() if key != "recipe"]
    parts = (
        OmegaConf.structured(config.Run),
        compose.read_recipe(file),
        OmegaConf.from_dotlist(lines),
    )
    return training.resolve_auto(compose.validate(OmegaConf.merge(*parts)))  # type: ignore[arg-type]


def seconds(device: str) -> float:
    """The time in seconds: wall time after a synchronization on a GPU, process time with one
    thread.

    Process time does not count what other processes do meanwhile.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, over rounds in which every function runs once."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
            print(f"round {number + 1}: {name} {times[name][-1]:.5g}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table whose columns but the first are aligned to the right."""
    titles = list(titles)
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def conditions(device: str = "cpu") -> str:
    """The command, the processor or GPU, torch's version, and the machine's load at the end."""
    command = f"python scripts/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    return f"`{command}`\n\n{machine}; torch {torch.__version__}; {load}."


def _processor() -> str:
    """Model, cores, and the threads that torch uses."""
    models = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
