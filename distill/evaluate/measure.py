"""teacher, student and a split -> what both are worth and what they cost: the nested dictionary of metrics.json.

Both answer the same batches once. From their outcomes come quality with 95 % intervals, a paired comparison, and how closely
the student follows its teacher; cost is measured in processes of its own (cost.py).
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from distill import config, data, fresh, models
from distill.errors import RunFailed
from distill.evaluate import cost, quality, status
from distill.models.loading import quiet
from distill.tasks.base import Batch, Task

log = logging.getLogger("distill")

Columns = dict[str, Tensor]  # outcomes of all examples, each (examples, ...)


def measure(run: config.Run, task: Task, examples: Dataset, tokenizer: Any, names: dict[str, str], split: str) -> dict[str, Any]:
    """Quality, comparison, fidelity and cost of `teacher` and `student`, folders or names; null where a number cannot be known."""
    device = models.device_of(run)
    with TemporaryDirectory() as temporary:
        log.info("measuring %s on %d examples: quality", " and ".join(names), len(examples))
        loaded = {what: _loaded(what, name, task, tokenizer) for what, name in names.items()}
        folders = {what: _folder(names[what], model, Path(temporary, what)) for what, model in loaded.items()}
        batches = data.loader(examples, task, tokenizer.pad_token_id, run.evaluate.batch_size)
        with status(run, "measuring quality"):
            with models.on(device, *loaded.values()):
                columns, followed = outcomes(task, loaded, batches)
            columns = {what: by_text(each, examples, batches.plan) for what, each in columns.items()}
            del loaded  # the processes that measure cost need the memory
            metrics = _worth(run, task, columns)
        if "teacher" in names:
            metrics["fidelity"] = followed | {"name": task.divergences[0]}
        log.info("measuring %s: cost", " and ".join(names))
        with status(run, "measuring cost"):
            costs, machine = _costs(run, task, examples, tokenizer.pad_token_id, folders, device)
    measured = {what: {"quality": metrics.pop(what), "cost": costs[what]} for what in names}
    texts = len(next(iter(columns["student"].values())))
    return finite({"split": split, "examples": len(examples), "texts": texts} | measured | metrics | {"machine": machine})


def _loaded(what: str, name: str, task: Task, tokenizer: Any) -> Any:
    model = models.load(name, None, task, what, tokenizer, strict=True)
    models.check_labels(model, task, what)
    return model


def _folder(name: str, model: Any, target: Path) -> Path:
    """Where the model's files are; one that came by name is stored, so that all are weighed in the same form."""
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    with quiet():
        model.save_pretrained(target)
    return target


def _worth(run: config.Run, task: Task, columns: dict[str, Columns]) -> dict[str, Any]:
    """Quality with intervals and, where there is a teacher, the paired comparison on the task's primary metric."""
    resamples = run.evaluate.bootstrap
    drawn = {what: quality.bootstrap(task, column, resamples, run.seed) for what, column in columns.items()}
    worth: dict[str, Any] = {what: {metric: each._asdict() for metric, each in one.intervals().items()} for what, one in drawn.items()}
    if "teacher" in drawn:
        worth["comparison"] = {
            "metric": task.primary,
            "maximise": task.maximise,
            "difference": quality.difference(drawn["student"], drawn["teacher"], task.primary)._asdict(),
            "p": quality.randomisation(task, columns["student"], columns["teacher"], resamples, run.seed),
        }
    return worth | {"resamples": resamples}


def _costs(run: config.Run, task: Task, examples: Dataset, pad_id: int, folders: dict[str, Path], device: str) -> Any:
    singles, groups = requests(task, examples, pad_id, run.evaluate)
    try:
        return cost.measure(folders, task.auto_class, singles, groups, run.evaluate.threads, device)
    except fresh.ProcessError as error:
        raise RunFailed(
            f"the measurement of cost ended early ({error}), but it must be known: the models are kept, run distill.evaluate"
        ) from error


def outcomes(task: Task, loaded: dict[str, Any], batches: Iterable[Batch]) -> tuple[dict[str, Columns], dict[str, float]]:
    """One pass over the batches: what quality needs of every example, for each model, and the student's fidelity to its teacher."""
    parts: dict[str, list[Columns]] = {what: [] for what in loaded}
    agreed, diverged = [], []
    with torch.inference_mode():
        for batch in (move_data_to_device(batch, loaded["student"].device) for batch in batches):
            rows = {what: task.rows(models.logits(model, batch.inputs), batch).float() for what, model in loaded.items()}
            for what, rows_NC in rows.items():
                parts[what].append({key: column.cpu() for key, column in task.outcomes(rows_NC, batch).items()})
            if "teacher" in rows:
                pair = _same_classes(rows["student"], rows["teacher"])
                agreed.append(task.agreement(*pair).cpu())
                diverged.append(task.divergence(*pair).cpu())
    columns = {what: {key: torch.cat([part[key] for part in some]) for key in some[0]} for what, some in parts.items()}
    means = {"agreement": agreed, "divergence": diverged}
    return columns, {key: float(torch.cat(values).double().mean()) for key, values in means.items() if values}


def by_text(columns: Columns, examples: Dataset, plan: data.BatchPlan) -> Columns:
    """Outcomes, in the plan's order, summed over the windows of each text where texts were cut into some.

    Windows of one text are alike, so that intervals from windows would be too narrow: what is resampled are texts.
    """
    if "begins" not in examples.column_names:
        return columns
    text_of = np.cumsum(examples.with_format("numpy")["begins"][:]) - 1
    index = torch.from_numpy(text_of[[place for micro in plan for place in micro.indices]])
    return {name: torch.zeros(int(text_of[-1]) + 1).double().index_add(0, index, column.double()) for name, column in columns.items()}


def _same_classes(student_NC: Tensor, teacher_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the classes that only a wider vocabulary has: no token of the tokenizer's."""
    shared = min(student_NC.shape[1], teacher_NC.shape[1])
    return student_NC[:, :shared], teacher_NC[:, :shared]


def requests(task: Task, examples: Dataset, pad_id: int, settings: config.Evaluate) -> tuple[list[Any], list[Any]]:
    """Inputs of the timed single requests and of the timed batches: real examples, spread evenly over the split."""
    singles = [[place] for place in spread(len(examples), settings.requests)]
    size = settings.batch_size
    chosen = sorted(spread(len(examples), size * settings.batches), key=examples["length"].__getitem__)
    groups = [chosen[first : first + size] for first in range(0, max(len(chosen) - size, 0) + 1, size)]  # full ones, like with like

    def inputs(places: list[int]) -> dict[str, list[list[int]]]:
        batch = task.collate([examples[place] for place in places], pad_id)
        return {name: tensor.tolist() for name, tensor in batch.inputs.items()}

    return [inputs(places) for places in singles], [inputs(places) for places in groups]


def spread(size: int, count: int) -> list[int]:
    """`count` places, at most all, spread evenly over `size`."""
    count = min(count, size)
    return [place * size // count for place in range(count)]


def finite(value: Any) -> Any:
    """The same structure with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
