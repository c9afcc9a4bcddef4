"""Parameters, bytes of weights, and peak memory of a process that runs one model on its inputs."""

from typing import Any

from .measurements import peak_memory
from .time_models import inputs, load_model, model_calls

CALLS = 3  # of each kind


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the only model of `models`."""
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    (name,) = request["models"]
    getattr(transformers, request["auto_class"])  # imports it: that memory is not the model's
    import_architecture(request["models"][name], name in request["trust_remote_code"])
    before = peak_memory()
    model = load_model(request, name)
    loaded = peak_memory()
    with torch.inference_mode():
        for kind in ("requests", "batches"):
            # Memory is highest with the most tokens; others would only take time.
            calls = sorted(inputs(request, name, kind), key=lambda call: call["input_ids"].numel())
            for call in model_calls(model, calls[-CALLS:]):
                call()
    tensors = [*model.parameters(), *model.buffers()]
    cost = {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "weight_bytes": sum(tensor_bytes(tensor) for tensor in tensors),
        "memory_before_bytes": before,
        "memory_loaded_bytes": loaded,
        "memory_peak_bytes": peak_memory(),
    }
    if request["device"] != "cpu":
        cost["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"cost": cost}


def import_architecture(folder: str, trust_remote_code: bool) -> None:
    """Import the module of a model's class, which loading the model would do."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for architecture in config.architectures or []:
        getattr(transformers, architecture, None)


def tensor_bytes(tensor: Any) -> int:
    """The memory of a tensor; quantized ones of torchao consist of several."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        return sum(tensor_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
