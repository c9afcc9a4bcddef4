"""Seconds for which training stands still while its state is saved.

    python scripts/bench_checkpoints.py [gb=2] [device=cpu] [rounds=3] [folder=FOLDER]

The state has a third of its bytes in weights and the rest in Adam's moments, in tensors of 16 MB
and one embedding of a tenth. `at once` serializes it into memory, hashes it and writes it, as
earlier versions did; `in the background` is `AtomicCheckpointIO`. Steps are small matrix products;
`a step meanwhile` is their time while the file is written, divided by that without.
"""

import hashlib
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark import conditions, options, table

from distill.training.checkpoint_files import checkpoint_path
from distill.training.checkpoint_writer import AtomicCheckpointIO

DEFAULTS = {"gb": 2.0, "device": "cpu", "rounds": 3, "folder": tempfile.gettempdir()}
WIDTH = 256  # of the products of a step
PRODUCTS = 20


def make_state(size: float, device: str) -> dict[str, Any]:
    """Weights and two moments each, of together `size` bytes."""
    floats = int(size / 4 / 3)
    shapes = [floats // 10, *[1 << 22] * (floats * 9 // 10 // (1 << 22))]
    weights = {str(index): torch.rand(shape, device=device) for index, shape in enumerate(shapes)}
    moments = {
        name: {"exp_avg": torch.rand_like(weight), "exp_avg_sq": torch.rand_like(weight)}
        for name, weight in weights.items()
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments}], "best_step": None}


def save_at_once(state: dict[str, Any], file: Path) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    hashlib.sha256(content.getbuffer()).hexdigest()
    with file.open("wb") as stream:
        stream.write(content.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


def step(matrix: torch.Tensor) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        matrix = (matrix @ matrix).sigmoid()
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def mean_step(matrix: torch.Tensor, until: Any) -> float:
    """Mean seconds of the steps until this is true."""
    times = [step(matrix)]
    while not until():
        times.append(step(matrix))
    return sum(times) / len(times)


class Background(NamedTuple):
    """A checkpoint that is written in the background."""

    still: float  # seconds for which training stands still
    complete: float  # seconds after which the file is complete
    meanwhile: float  # seconds of a step until then


def in_background(
    writer: AtomicCheckpointIO, state: dict[str, Any], file: Path, matrix: torch.Tensor
) -> Background:
    """Save a state while steps go on."""
    start = time.perf_counter()
    writer.save_checkpoint(state, file)
    still = time.perf_counter() - start
    meanwhile = mean_step(matrix, writer.is_idle)
    return Background(still, time.perf_counter() - start, meanwhile)


def main() -> None:
    settings, _ = options(DEFAULTS)
    device = settings["device"]
    state = make_state(settings["gb"] * 1e9, device)
    matrix = torch.rand(WIDTH, WIDTH, device=device)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=settings["folder"]) as name:
        writer = AtomicCheckpointIO(keep=1)
        for number in range(1, settings["rounds"] + 1):
            end = time.perf_counter() + 2
            alone = mean_step(matrix, lambda end=end: time.perf_counter() > end)
            start = time.perf_counter()
            save_at_once(state, Path(name) / "at_once")
            rows.append(["at once", number, *[f"{time.perf_counter() - start:.2f}"] * 2, ""])
            saved = in_background(writer, state, checkpoint_path(Path(name), number), matrix)
            times = [f"{saved.still:.2f}", f"{saved.complete:.2f}"]
            rows.append(["in the background", number, *times, f"{saved.meanwhile / alone:.2f}"])
        writer.teardown()
    rows.sort(key=lambda row: str(row[0]))
    titles = ["way", "round", "stands still, s", "complete after, s", "a step meanwhile"]
    print(table(titles, rows))
    print(f"\n{settings['gb']:g} GB on {device}. {conditions(device)}")


if __name__ == "__main__":
    main()
