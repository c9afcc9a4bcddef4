"""Peak memory of a process that loads one model and generates."""

from typing import Any

from .measurements import peak_memory
from .model_memory import import_architecture
from .time_generation import generate
from .time_models import inputs, load_model


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the only model of `models`."""
    import torch

    torch.set_num_threads(request["threads"])
    (name,) = request["models"]
    import_architecture(request["models"][name], name in request["trust_remote_code"])
    model = load_model(request, name)
    with torch.inference_mode():
        generate(model, inputs(request, name, "batches")[0], request["new_tokens"])
    cost = {"memory_peak_bytes": peak_memory()}
    if request["device"] != "cpu":
        cost["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"cost": cost}
