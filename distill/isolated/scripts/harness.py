"""Metrics of models on tasks of lm-eval, EleutherAI's language model evaluation harness."""

import os
from numbers import Real
from typing import Any

from .time_models import load_model

# Variables of launchers, by which lm-eval would wait for processes that do not exist.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the models of `models` on `tasks`; without models, list the `unknown` tasks."""
    for name in LAUNCHER:
        os.environ.pop(name, None)
    folder = request["path"]
    if folder is not None:
        os.chdir(folder)  # task files name their data relative to it
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    unknown = [task for task in request["tasks"] if task not in manager.all_tasks]
    metrics = {name: measure(request, name, manager) for name in request["models"]}
    return {"unknown": unknown, "metrics": metrics}


def measure(request: dict[str, Any], name: str, manager: Any) -> dict[str, list[float | None]]:
    """The value and the standard error of each metric of a model, by task and metric."""
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(request["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["tokenizers"][name])
    model = HFLM(
        pretrained=load_model(request, name),
        tokenizer=tokenizer,
        batch_size=request["batch_size"],
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=request["tasks"],
        task_manager=manager,
        limit=request["limit"],
        log_samples=False,
    )
    return read_metrics(results["results"])


def read_metrics(results: dict[str, dict[str, Any]]) -> dict[str, list[float | None]]:
    """The numbers of lm-eval's results, whose keys are `metric,filter`."""
    metrics: dict[str, list[float | None]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, post_processing = key.partition(",")
            if not post_processing or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = values.get(f"{metric}_stderr,{post_processing}")
            shown = metric if post_processing == "none" else f"{metric} ({post_processing})"
            spread = float(error) if isinstance(error, Real) else None
            metrics[f"{task} {shown}"] = [float(value), spread]
    return metrics
