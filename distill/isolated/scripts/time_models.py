"""Latency of single requests and throughput of batches of models, which take turns."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from .measurements import TURN, WARM_UP, interleave, latency, machine

Inputs = dict[str, Any]  # arguments of a model's forward by name, tensors of (B, L)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Time the models of `models`, folders by name, with their `inputs`, by name too."""
    import torch

    torch.set_num_threads(request["threads"])
    models = {name: load_model(request, name) for name in request["models"]}
    seconds = {}
    with torch.inference_mode():
        for kind in ("requests", "batches"):
            calls = {
                name: model_calls(models[name], inputs(request, name, kind)) for name in models
            }
            seconds[kind] = interleave(calls, WARM_UP[kind], TURN[kind])
    costs = {
        name: latency(seconds["requests"][name])
        | throughput(seconds["batches"][name], inputs(request, name, "batches"))
        for name in models
    }
    counts = {kind: len(next(iter(times.values()))) for kind, times in seconds.items()}
    return {"costs": costs, "machine": machine(request, **counts)}


def load_model(request: dict[str, Any], name: str) -> Any:
    """A model in eval mode; code in its folder runs only if the request allows it."""
    import torch
    import transformers

    model = getattr(transformers, request["auto_class"]).from_pretrained(
        request["models"][name],
        dtype=getattr(torch, request["dtypes"][name]),
        attn_implementation=request["attention"],
        trust_remote_code=name in request["trust_remote_code"],
    )
    return model.eval().to(request["device"])


def inputs(request: dict[str, Any], name: str, kind: str) -> list[Inputs]:
    """A model's requests or batches, as tensors."""
    import torch

    return [
        {key: torch.tensor(values, device=request["device"]) for key, values in arguments.items()}
        for arguments in request["inputs"][name][kind]
    ]


def model_calls(model: Any, inputs: Sequence[Inputs]) -> list[Callable[[], None]]:
    """A forward pass for each of the inputs, with the arguments that the model accepts."""
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    return [
        partial(
            _forward, model, {key: arguments[key] for key in arguments if key in known} | options
        )
        for arguments in inputs
    ]


def _forward(model: Any, arguments: Inputs) -> None:
    model(**arguments)
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()  # kernels run asynchronously


def throughput(seconds: list[float], batches: Sequence[Inputs]) -> dict[str, float]:
    """Medians over the batches of examples and tokens, without padding, per second."""
    examples = [len(batch["input_ids"]) for batch in batches]
    tokens = [
        int(batch["attention_mask"].sum())
        if "attention_mask" in batch
        else batch["input_ids"].numel()
        for batch in batches
    ]
    return {
        f"{unit}_per_s": median(count / spent for count, spent in zip(counts, seconds, strict=True))
        for unit, counts in (("examples", examples), ("tokens", tokens))
    }
