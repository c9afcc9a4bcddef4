"""Predictions of one runtime for all texts, and the peak memory of its process."""

from typing import Any

from .measurements import peak_memory
from .runtime_models import as_texts, load_runtime_model, set_threads


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the only model of `models`; `answer` is `logits`, or `next_token` for their argmax."""
    set_threads(request)
    (model,) = request["models"].values()
    before = peak_memory()
    predict = load_runtime_model(model)
    loaded = peak_memory()
    rows = [row_C for batch in request["batches"] for row_C in predict(as_texts(batch))]
    all_logits = request["answer"] == "logits"
    predictions = [row_C.tolist() if all_logits else int(row_C.argmax()) for row_C in rows]
    cost = {
        "memory_before_bytes": before,
        "memory_loaded_bytes": loaded,
        "memory_peak_bytes": peak_memory(),
    }
    return {"predictions": predictions, "cost": cost}
