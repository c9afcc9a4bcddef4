"""Latency, throughput, memory and bytes of models, measured in isolated processes."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from distill import isolated
from distill.evaluate.records import Cost, Machine
from distill.store import MANIFEST

DTYPE = "float32"  # in which runtimes are compared

Inputs = dict[str, list[list[int]]]  # arguments of a model's forward by name, each (B, L)


class TimedInputs(NamedTuple):
    """Inputs of the timed calls of one model."""

    requests: Sequence[Inputs]  # of one example each
    batches: Sequence[Inputs]


def measure_costs(
    folders: Mapping[str, Path],
    inputs: Mapping[str, TimedInputs],
    auto_class: str,
    threads: int,
    device: str,
    dtype: str = DTYPE,
) -> tuple[dict[str, Cost], Machine]:
    """Measure models in isolated processes: one times all, one for each measures its memory.

    Args:
        folders: Folder of each model by name.
        inputs: Timed inputs of each model by name: encodings of the same examples.
        auto_class: Class of transformers that loads the models.
        threads: CPU threads of each process.
        device: `cpu` or `cuda`.
        dtype: Float type in which models are measured that are not compressed.

    Returns:
        The costs of each model by name, and the machine with the settings of the measurement.

    Raises:
        ProcessError: if a process fails.
    """
    from distill.models import has_own_code, measured_dtype  # imports torch

    request: dict[str, Any] = {
        "models": {name: str(folder.resolve()) for name, folder in folders.items()},
        "auto_class": auto_class,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "dtypes": {name: measured_dtype(folder, dtype) for name, folder in folders.items()},
        "attention": "eager" if device == "cpu" else "sdpa",
        "inputs": {name: timed._asdict() for name, timed in inputs.items()},
        "trust_remote_code": [name for name, folder in folders.items() if has_own_code(folder)],
    }
    timed = isolated.run_isolated("time_models", request)
    single = [request | {"models": {name: path}} for name, path in request["models"].items()]
    with ThreadPoolExecutor(len(single)) as pool:
        responses = pool.map(lambda model: isolated.run_isolated("model_memory", model), single)
        memory = {name: response["cost"] for name, response in zip(folders, responses, strict=True)}
    costs = {
        name: Cost(
            **timed["costs"][name],
            **memory[name],
            disk_bytes=disk_bytes(folder),
            bits_per_weight=8 * weight_bytes(folder) / memory[name]["parameters"],
        )
        for name, folder in folders.items()
    }
    return costs, Machine.from_json(timed["machine"])


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights' files: safetensors, packed or not, or else pytorch_model."""
    return disk_bytes(folder, "*.safetensors") or disk_bytes(folder, "pytorch_model*.bin")


def disk_bytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of a folder's files that match the pattern, without the store's manifest."""
    files = (file for file in folder.rglob(pattern) if file.is_file() and file.name != MANIFEST)
    return sum(file.stat().st_size for file in files)
