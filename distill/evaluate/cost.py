"""What a user pays for a model: latency, throughput, memory, bytes. Measured in fresh processes that hold nothing else.

    python cost.py question.json answer.json

is the measuring process. It needs torch and transformers alone; `question.json` is what :func:`measure` writes.
"""

import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WARM_UP = {
    "requests": 10,
    "batches": 2,
}  # untimed calls of each model, with the first of the inputs, before the timed ones
TURN = {
    "requests": 10,
    "batches": 1,
}  # calls of a model's turn: one that serves requests finds its weights in the processor's cache
DTYPE = "float32"  # the baseline in which both models are timed

Inputs = dict[str, list[list[int]]]  # what a model takes, each (B, L)
Costs = dict[str, float]


def measure(
    folders: dict[str, Path],
    auto_class: str,
    requests: Sequence[Inputs],
    batches: Sequence[Inputs],
    threads: int,
    device: str,
    own: Mapping[str, tuple[Sequence[Inputs], Sequence[Inputs]]] | None = None,
) -> tuple[dict[str, Costs], dict[str, Any]]:
    """The costs of each model, and what they were measured on: one process times all, then one per model weighs its memory.

    `own` are the requests and batches, of the same texts, of models that read other token ids.
    """
    from distill.isolated import (
        run_isolated,  # not at the top: the measuring process runs this file and has no `distill`
    )
    from distill.models.loading import has_own_code

    models = {name: str(folder.resolve()) for name, folder in folders.items()}
    question = {
        "models": models,
        "auto_class": auto_class,
        "threads": threads,
        "device": device,
        "dtype": DTYPE,
    }
    question |= {
        "attention": "eager" if device == "cpu" else "sdpa",
        "requests": list(requests),
        "batches": list(batches),
    }
    question["coded"] = [name for name, folder in folders.items() if has_own_code(folder)]
    question["own"] = {
        name: {"requests": list(singles), "batches": list(groups)}
        for name, (singles, groups) in (own or {}).items()
    }
    script = Path(__file__)
    timed = run_isolated(script, question | {"measure": "speed"})
    alone = [
        question | {"measure": "memory", "models": {name: folder}}
        for name, folder in models.items()
    ]
    with ThreadPoolExecutor(len(alone)) as pool:
        weighed = [
            answer["costs"] for answer in pool.map(lambda one: run_isolated(script, one), alone)
        ]
    memory = {name: costs for one in weighed for name, costs in one.items()}
    disk = {name: _on_disk(folder, memory[name]["parameters"]) for name, folder in folders.items()}
    return {name: timed["costs"][name] | memory[name] | disk[name] for name in models}, timed[
        "machine"
    ]


def _on_disk(folder: Path, parameters: float) -> Costs:
    return {
        "disk_bytes": disk_bytes(folder),
        "bits_per_weight": 8 * weight_bytes(folder) / parameters,
    }


def weight_bytes(folder: Path) -> int:
    """The bytes of a model's weights in the form that is loaded: safetensors, packed or not, where there are some."""
    return disk_bytes(folder, "*.safetensors") or disk_bytes(folder, "pytorch_model*.bin")


def disk_bytes(folder: Path, pattern: str = "*") -> int:
    """The bytes of all files in a folder, weights, config and tokenizer, or of those that fit the pattern; not the store's manifest."""
    from distill.store import MANIFEST  # not at the top: see above

    return sum(
        file.stat().st_size
        for file in folder.rglob(pattern)
        if file.is_file() and file.name != MANIFEST
    )


def speed(question: dict[str, Any]) -> dict[str, Any]:
    """Latency of single requests, then throughput of batches; the models take turns."""
    models = _load_all(question)
    requests, batches = (
        {name: _calls(question, name, what) for name in models} for what in ("requests", "batches")
    )
    latencies = interleaved(models, requests, WARM_UP["requests"], TURN["requests"])
    times = interleaved(models, batches, WARM_UP["batches"], TURN["batches"])
    costs = {
        name: _latency(latencies[name]) | _throughput(times[name], batches[name]) for name in models
    }
    return {"costs": costs, "machine": machine(question)}


def memory(question: dict[str, Any]) -> dict[str, Any]:
    """The peak memory of a process that loads one model and answers the requests and batches."""
    import torch
    import transformers

    getattr(
        transformers, question["auto_class"]
    )  # imported before the model's share of memory begins
    before = peak_memory()
    (name, model), *_ = _load_all(question).items()
    loaded = peak_memory()
    interleaved(
        {name: model},
        {name: _calls(question, name, "requests") + _calls(question, name, "batches")},
    )
    tensors = [*model.parameters(), *model.buffers()]
    costs = {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "weight_bytes": sum(_bytes(tensor) for tensor in tensors),
        "memory_before_bytes": before,
        "memory_loaded_bytes": loaded,
        "memory_peak_bytes": peak_memory(),
    }
    if question["device"] != "cpu":
        costs["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"costs": {name: costs}}


def _bytes(tensor: Any) -> int:
    """What a tensor takes in memory; one of torchao's is made of others."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def interleaved(
    models: dict[str, Any],
    calls: Mapping[str, Sequence[dict[str, Any]]],
    warm_up: int = 0,
    turn: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each model's calls, as many for each; the models take turns of so many calls, and in turn go first."""
    for name, model in models.items():
        for inputs in calls[name][:warm_up]:
            _seconds(model, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for first in range(0, len(calls[names[0]]), turn):
        for name in names:
            seconds[name] += [
                _seconds(models[name], inputs) for inputs in calls[name][first : first + turn]
            ]
        names.reverse()
    return seconds


def _seconds(model: Any, inputs: dict[str, Any]) -> float:
    import torch

    known = inspect.signature(model.forward).parameters
    options = {name: tensor for name, tensor in inputs.items() if name in known} | (
        {"use_cache": False} if "use_cache" in known else {}
    )
    with torch.inference_mode():
        start = time.perf_counter()
        model(**options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _latency(seconds: list[float]) -> Costs:
    import numpy as np

    return {
        f"latency_p{share}_ms": 1000 * float(np.percentile(seconds, share))
        for share in (50, 90, 99)
    }


def _throughput(seconds: list[float], batches: Sequence[dict[str, Any]]) -> Costs:
    """Medians over the batches; tokens do not count padding."""
    from statistics import median

    examples = [len(inputs["input_ids"]) for inputs in batches]
    tokens = [
        int(inputs["attention_mask"].sum())
        if "attention_mask" in inputs
        else inputs["input_ids"].numel()
        for inputs in batches
    ]
    return {
        "examples_per_s": median(
            count / spent for count, spent in zip(examples, seconds, strict=True)
        ),
        "tokens_per_s": median(count / spent for count, spent in zip(tokens, seconds, strict=True)),
    }


def _load_all(question: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _load(question, name).eval().to(question["device"]) for name in question["models"]
    }


def _load(question: dict[str, Any], name: str) -> Any:
    """Code that lies in the folder is run only where it is this library's own."""
    import torch
    import transformers

    options = {
        "dtype": getattr(torch, question["dtype"]),
        "attn_implementation": question["attention"],
    }
    auto, coded = getattr(transformers, question["auto_class"]), name in question["coded"]
    return auto.from_pretrained(question["models"][name], trust_remote_code=coded, **options)


def _calls(question: dict[str, Any], name: str, what: str) -> list[dict[str, Any]]:
    """The requests or batches of a model, its own or those of all."""
    import torch

    calls = question["own"].get(name, question)[what]
    return [
        {key: torch.tensor(values, device=question["device"]) for key, values in inputs.items()}
        for inputs in calls
    ]


def peak_memory() -> int:
    """The most resident memory that this process has had so far, in bytes.

    Not `ru_maxrss` on Linux: it survives exec, so that a child of a large process would report its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return (
            next(
                int(line.split()[1])
                for line in status.read_text().splitlines()
                if line.startswith("VmHWM")
            )
            * 1024
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(question: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on, and how."""
    import torch
    import transformers

    on_gpu = question["device"] != "cpu"
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    how = {key: question[key] for key in ("threads", "dtype", "attention")}
    return (
        found
        | how
        | {
            "warm_up": WARM_UP,
            "turn": TURN,
            "requests": len(question["requests"]),
            "batches": len(question["batches"]),
        }
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Answer one question."""
    asked, answered = sys.argv[1:]
    question = json.loads(Path(asked).read_text())
    sys.path += [entry for entry in question.get("packages", []) if entry not in sys.path]
    sys.path.insert(
        0, str(Path(asked).parent / "modules")
    )  # where a model's own code is put: not shared with other processes
    os.environ["HF_MODULES_CACHE"] = sys.path[0]
    import torch

    torch.set_num_threads(question["threads"])
    measurement = {"speed": speed, "memory": memory}[question["measure"]]
    Path(answered).write_text(json.dumps(measurement(question)))


if __name__ == "__main__":
    main()
