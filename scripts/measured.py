"""What the scripts that measure share: a recipe with changes, turns, medians, and the line about the machine."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from omegaconf import OmegaConf

from distill import cli, data, models
from distill.recipe import compose, config, targets
from distill.training import loop

os.environ |= cli.ENVIRONMENT | os.environ  # as the commands have it
SILENT = {"tracking.wandb": "disabled", "trainer.progress": False}


def options(defaults: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`key=value` arguments: those of the script, and those of the recipe."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    return {name: type(value)(given.pop(name, value)) for name, value in defaults.items()}, given


def composed(changes: dict[str, Any]) -> config.Run:
    """The recipe that `recipe` names, with the other keys laid over it."""
    name = changes.get("recipe", "bert_to_distil")
    lines = [f"{key}={value}" for key, value in (SILENT | changes).items() if key != "recipe"]
    schema = OmegaConf.structured(config.Run)
    return loop.resolve_auto(
        compose.validate(
            OmegaConf.merge(
                schema,
                compose.read_recipe(compose.available_recipes()[name]),
                OmegaConf.from_dotlist(lines),
            )
        )
    )  # type: ignore[arg-type]


class Prepared(NamedTuple):
    """What the data stage of a run makes."""

    task: Any
    tokenizer: Any
    examples: DatasetDict


def prepared(run: config.Run) -> Prepared:
    task = targets.instantiate(run.task)
    raw = data.load(run.data, task, run.seed)
    tokenizer = models.build_tokenizer(run, task, raw["train"])
    return Prepared(task, tokenizer, data.encode(raw, task, tokenizer, run.data))


def seconds(device: str) -> float:
    """Of this process on a CPU, whatever else the machine does; on a GPU by the clock, when it has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each way answers, over rounds in which they take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            print(f"round {number + 1}: {name} {found[name][-1]:.5g}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in found.items()}


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    titles = list(titles)
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def conditions(device: str = "cpu") -> str:
    """The command, and the machine with what was free of it."""
    command = f"python scripts/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        named = [
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        where = f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
    return f"`{command}`\n\n{where}; torch {torch.__version__}; load when it ended {os.getloadavg()[0]:.1f}."
