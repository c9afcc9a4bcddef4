"""Times of the tokens that models generate, in turns, and the bytes of their caches."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from .measurements import interleave
from .time_models import Inputs, inputs, load_model

WARM_UP, TURN = 1, 1


class TokenClock:
    """A streamer of `generate` that keeps the moments at which tokens arrive."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, tokens: Any) -> None:
        """Called once with the prompts, then with each token; tokens are on the CPU."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Time the models of `models`, which continue their inputs by `new_tokens` tokens each."""
    import torch

    torch.set_num_threads(request["threads"])
    models = {name: load_model(request, name) for name in request["models"]}
    costs: dict[str, dict[str, Any]] = {name: {} for name in models}
    with torch.inference_mode():
        for kind, summarize in (("requests", of_requests), ("batches", of_batches)):
            timed: dict[str, list[list[float]]] = {name: [] for name in models}
            calls = {
                name: generation_calls(
                    model, inputs(request, name, kind), request["new_tokens"], timed[name]
                )
                for name, model in models.items()
            }
            interleave(calls, WARM_UP, TURN)
            for name, moments in timed.items():
                size = len(request["inputs"][name][kind][0]["input_ids"])
                costs[name] |= summarize(moments[WARM_UP:], size)
        for name, model in models.items():
            longest = max(
                inputs(request, name, "requests"), key=lambda one: one["input_ids"].numel()
            )
            costs[name] |= cache_cost(model, longest, request["new_tokens"])
    return {"costs": costs}


def generation_calls(
    model: Any, prompts: list[Inputs], new_tokens: int, timed: list[list[float]]
) -> list[Callable[[], None]]:
    """A generation for each of the inputs, which adds its start and its moments to `timed`."""
    return [partial(timed_generation, model, prompt, new_tokens, timed) for prompt in prompts]


def timed_generation(model: Any, prompt: Inputs, new_tokens: int, timed: list[list[float]]) -> None:
    """Generate, and add the moments: the start, then that of each token."""
    clock, start = TokenClock(), time.perf_counter()
    generate(model, prompt, new_tokens, streamer=clock)
    timed.append([start, *clock.moments[1:]])


def generate(model: Any, prompt: Inputs, new_tokens: int, **options: Any) -> Any:
    """Continue prompts greedily by exactly `new_tokens` tokens; stop tokens do not end them."""
    import transformers

    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    return model.generate(**prompt, **options)


def of_requests(timed: list[list[float]], size: int) -> dict[str, float]:
    """Medians over single requests: time to the first token, of each later one, tokens/s."""
    later = [(times[-1] - times[1]) / (len(times) - 2) for times in timed if len(times) > 2]
    return {
        "first_token_ms": 1000 * median(times[1] - times[0] for times in timed),
        "tokens_per_s": median((len(times) - 1) / (times[-1] - times[0]) for times in timed),
    } | ({"token_ms": 1000 * median(later)} if later else {})


def of_batches(timed: list[list[float]], size: int) -> dict[str, float]:
    """The median over batches of `size` prompts."""
    speeds = [size * (len(times) - 1) / (times[-1] - times[0]) for times in timed]
    return {"batch_tokens_per_s": median(speeds)}


def cache_cost(model: Any, prompt: Inputs, new_tokens: int) -> dict[str, float]:
    """Bytes of the cache after a generation, per token that was read; none without a cache."""
    result = generate(model, prompt, new_tokens, return_dict_in_generate=True)
    size = nested_bytes(result.get("past_key_values"), set())
    read = result.sequences.numel() - 1  # the last token is not read
    return {"cache_bytes_per_token": size / read} if size else {}


def nested_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors in nested objects, each counted once: keys, values and states."""
    import torch

    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(nested_bytes(part, seen) for part in value)
    parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return sum(nested_bytes(part, seen) for part in list(parts.values()))
