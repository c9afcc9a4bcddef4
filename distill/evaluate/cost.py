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
    request: dict[str, Any], inputs: Mapping[str, TimedInputs]
) -> tuple[dict[str, Cost], Machine]:
    """Measure models in isolated processes: one times all, one for each measures its memory.

    Args:
        request: The models, see :func:`model_request`.
        inputs: Timed inputs of each model by name: encodings of the same examples.

    Returns:
        The costs of each model by name, and the machine with the settings of the measurement.

    Raises:
        ProcessError: if a process fails.
    """
    request = request | {"inputs": {name: timed._asdict() for name, timed in inputs.items()}}
    timed = isolated.run_isolated("time_models", request)
    memory = _run_each("model_memory", request)
    costs = {
        name: Cost(
            **timed["costs"][name],
            **memory[name],
            disk_bytes=disk_bytes(Path(folder)),
            bits_per_weight=8 * weight_bytes(Path(folder)) / memory[name]["parameters"],
        )
        for name, folder in request["models"].items()
    }
    return costs, Machine.from_json(timed["machine"])


def measure_generation_costs(
    request: dict[str, Any], inputs: Mapping[str, TimedInputs], new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Measure generation in isolated processes, as :func:`measure_costs` measures calls.

    Args:
        request: The models, see :func:`model_request`.
        inputs: Prompts of each model by name, padded on the left.
        new_tokens: Tokens that are generated after each prompt.

    Returns:
        The costs of each model by name: fields of :class:`Generation`.

    Raises:
        ProcessError: if a process fails.
    """
    prompts = {name: timed._asdict() for name, timed in inputs.items()}
    request = request | {"inputs": prompts, "new_tokens": new_tokens}
    timed = isolated.run_isolated("time_generation", request)["costs"]
    memory = _run_each("generation_memory", request)
    return {name: timed[name] | memory[name] for name in request["models"]}


def model_request(
    folders: Mapping[str, Path],
    auto_class: str,
    threads: int,
    device: str,
    dtype: str = DTYPE,
) -> dict[str, Any]:
    """What the scripts need to load models.

    Args:
        folders: Folder of each model by name.
        auto_class: Class of transformers that loads the models.
        threads: CPU threads of each process.
        device: `cpu` or `cuda`.
        dtype: Float type in which models are measured that are not compressed.
    """
    from distill.models import has_own_code, measured_dtype  # imports torch

    return {
        "models": {name: str(folder.resolve()) for name, folder in folders.items()},
        "auto_class": auto_class,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "dtypes": {name: measured_dtype(folder, dtype) for name, folder in folders.items()},
        "attention": "eager" if device == "cpu" else "sdpa",
        "trust_remote_code": [name for name, folder in folders.items() if has_own_code(folder)],
    }


def _run_each(script: str, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The costs of each model by name, from a process that holds this model only."""
    models = request["models"]
    single = [request | {"models": {name: path}} for name, path in models.items()]
    with ThreadPoolExecutor(len(single)) as pool:
        responses = pool.map(lambda model: isolated.run_isolated(script, model), single)
        return {name: response["cost"] for name, response in zip(models, responses, strict=True)}


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights' files: safetensors, packed or not, or else pytorch_model."""
    return disk_bytes(folder, "*.safetensors") or disk_bytes(folder, "pytorch_model*.bin")


def disk_bytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of a folder's files that match the pattern, without the store's manifest."""
    files = (file for file in folder.rglob(pattern) if file.is_file() and file.name != MANIFEST)
    return sum(file.stat().st_size for file in files)
