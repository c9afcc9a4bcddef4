"""Latency of single texts and throughput of batches, with tokenization, of runtimes in turns."""

from functools import partial
from statistics import median
from typing import Any

from .measurements import TURN, WARM_UP, interleave, latency, machine
from .runtime_models import as_texts, load_runtime_model, set_threads


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Time the runtimes of `models` with the texts of `requests` and `batches`."""
    set_threads(request)
    models = {name: load_runtime_model(model) for name, model in request["models"].items()}
    seconds = {}
    for kind in ("requests", "batches"):
        batches = [as_texts(batch) for batch in request[kind]]
        calls = {
            name: [partial(predict, texts) for texts in batches] for name, predict in models.items()
        }
        seconds[kind] = interleave(calls, WARM_UP[kind], TURN[kind])
    sizes = [len(batch) for batch in request["batches"]]
    costs = {
        name: latency(seconds["requests"][name])
        | {"examples_per_s": _throughput(sizes, seconds["batches"][name])}
        for name in models
    }
    counts = {kind: len(request[kind]) for kind in seconds}
    return {"costs": costs, "machine": machine(request, **counts)}


def _throughput(sizes: list[int], seconds: list[float]) -> float:
    return median(size / spent for size, spent in zip(sizes, seconds, strict=True))
