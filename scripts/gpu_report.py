"""What the project promises on a GPU, measured: one Markdown table, and the same as JSON.

    python scripts/gpu_report.py [only=loss,language] [json=FOLDER/report.json] [limit=360]

Each part runs in its own process with its own time limit, so that one that fails or hangs does not
take the others with it; a part that does not end in time is reported as such. `limit`: seconds for
all parts. Goals are those of one H100.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from benchmark import options, table
from gpu_parts import Figure

PARTS: dict[str, tuple[Callable[..., Iterator[Figure]], int]] = {  # function, seconds at most
    "loss": (gpu_parts.loss, 60),
    "language": (gpu_parts.language, 90),
    "small": (gpu_parts.small, 60),
    "checkpoint": (gpu_parts.checkpoint, 60),
    "stages": (gpu_parts.stages, 90),
    "tests": (gpu_parts.tests, 100),
}
TITLES = ("figure", "measured", "goal", "held")
PACKAGES = ("torch", "transformers", "lightning", "triton")


def run_part(name: str, limit: float) -> list[dict[str, Any]]:
    """The figures of one part, from its own process."""
    command = [sys.executable, __file__, f"part={name}"]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the processes that a part starts end with it
    )
    problem = ""
    try:
        lines, errors = process.communicate(timeout=limit)
        if process.returncode:
            problem = f"failed: {(errors.strip().splitlines() or ['no output'])[-1]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        lines, _ = process.communicate()
        problem = f"not ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    figures = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    if problem:
        figures.append({"name": f"part '{name}'", "measured": problem, "goal": "", "held": False})
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


def conditions() -> dict[str, str]:
    """The card and the versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            versions[package] = "not installed"
    return {"card": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


def row(figure: dict[str, Any]) -> tuple[str, ...]:
    held = {None: "", True: "yes", False: "**no**"}[figure["held"]]
    return figure["name"], figure["measured"], figure["goal"], held


def main() -> None:
    settings, _ = options({"only": ",".join(PARTS), "part": "", "json": "", "limit": 360.0})
    if not torch.cuda.is_available():
        sys.exit("no GPU is available to torch, and every figure of this report is of a GPU")
    if settings["part"]:
        for figure in PARTS[settings["part"]][0]():
            print(json.dumps(figure._asdict()), flush=True)
        return
    end = time.monotonic() + settings["limit"]
    figures: list[dict[str, Any]] = []
    for name in settings["only"].split(","):
        figures += run_part(name, max(1.0, min(PARTS[name][1], end - time.monotonic())))
        if settings["json"]:
            report = {"conditions": conditions(), "figures": figures}
            Path(settings["json"]).write_text(json.dumps(report, indent=1))
    print(table(TITLES, map(row, figures)))
    print("\n" + "; ".join(f"{key} {value}" for key, value in conditions().items()))


if __name__ == "__main__":
    main()
