"""Quality, fidelity and cost of teacher and student on one split."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill import data, isolated, models
from distill.errors import RunFailed
from distill.evaluate import quality
from distill.evaluate.console import status
from distill.evaluate.cost import measure_costs
from distill.evaluate.inputs import ModelInputs, inputs_by_model, timed_inputs
from distill.evaluate.outcomes import Columns, collect_outcomes, model_batches, sum_by_text
from distill.evaluate.records import (
    Comparison,
    Cost,
    Interval,
    Machine,
    Metrics,
    ModelMetrics,
)
from distill.evaluate.settings import MeasureSettings
from distill.models import has_own_code, silence_transformers, write_auto_map
from distill.prepare import Prepared
from distill.remote_code import container
from distill.tasks.base import Task

log = logging.getLogger("distill")


def measure(
    settings: MeasureSettings,
    prepared: Prepared,
    paths: Mapping[str, str],
    split: str,
    shipped: Path | None = None,
) -> Metrics:
    """Measure models on a split.

    Args:
        settings: How they are measured.
        prepared: The data, with this split encoded.
        paths: Folder or name of `teacher` and `dense`, which may be left out, and of `student`.
        split: Split of the data.
        shipped: Folder of the exported student, measured in its place.

    Raises:
        RunFailed: if a process that measures cost fails.
    """
    task, examples = prepared.task, prepared.examples[split]
    inputs = inputs_by_model(prepared, settings.data, paths, split)
    if shipped is not None:
        paths = {**paths, "student": str(shipped)}
    with TemporaryDirectory() as temporary:
        loaded = {
            name: models.load_trained(path, task, name, inputs[name].tokenizer, settings.dtype)
            for name, path in paths.items()
        }
        folders = {
            name: _local_folder(paths[name], model, Path(temporary, name))
            for name, model in loaded.items()
        }
        device = models.resolve_device(settings.trainer)
        plan = data.BatchPlan(examples, data.Batching(settings.evaluate.batch_size))
        log.info("measuring %s on %d examples: quality", _join(paths), len(examples))
        with status("measuring quality", settings.trainer.progress):
            if task.predicts_tokens and "teacher" in loaded:  # the student learns no other tokens
                models.cut_to_vocabulary(loaded["teacher"], inputs["teacher"].tokenizer, "teacher")
            batches = model_batches(task, inputs, plan)
            columns, fidelity = collect_outcomes(task, loaded, batches, device)
            columns = {
                name: sum_by_text(outcomes, examples, plan) for name, outcomes in columns.items()
            }
            intervals, comparison = _quality(
                task, columns, settings.evaluate.bootstrap, settings.seed
            )
        del loaded  # the processes that measure cost need the memory
        log.info("measuring %s: cost", _join(paths))
        with status("measuring cost", settings.trainer.progress):
            costs, machine = _costs(task, inputs, folders, settings, device)
    return Metrics(
        split=split,
        examples=len(examples),
        texts=len(next(iter(columns["student"].values()))),
        models={name: ModelMetrics(intervals[name], costs[name]) for name in paths},
        resamples=settings.evaluate.bootstrap,
        machine=machine,
        comparison=comparison,
        fidelity=fidelity or None,
        divergence=task.divergences[0] if fidelity else None,
    )


def _join(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _local_folder(path: str, model: Any, target: Path) -> Path:
    """The folder of a model's files; one from the Hub is saved, so that all have one layout."""
    folder = Path(path).expanduser()
    if folder.is_dir() and (
        "auto_map" not in (folder / "config.json").read_text() or has_own_code(folder)
    ):
        return folder
    with silence_transformers():
        model.save_pretrained(target)
    write_auto_map(model, target, container.needs_code(model.config))
    return target


def _quality(
    task: Task, columns: Mapping[str, Columns], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Interval]], Comparison | None]:
    """The metrics of each model, and the comparison with the teacher, if there is one."""
    resampled = {
        name: quality.bootstrap(task, outcomes, resamples, seed)
        for name, outcomes in columns.items()
    }
    intervals = {name: draws.intervals() for name, draws in resampled.items()}
    if "teacher" not in resampled:
        return intervals, None
    metric = task.primary_metric
    difference = quality.difference(resampled["student"], resampled["teacher"], metric)
    p = quality.randomization_test(task, columns["student"], columns["teacher"], resamples, seed)
    return intervals, Comparison(metric, task.maximize, difference, p)


def _costs(
    task: Task,
    inputs: Mapping[str, ModelInputs],
    folders: Mapping[str, Path],
    settings: MeasureSettings,
    device: str,
) -> tuple[dict[str, Cost], Machine]:
    measured, threads = settings.evaluate, settings.evaluate.threads
    timed = {name: timed_inputs(task, encoded, measured) for name, encoded in inputs.items()}
    try:
        return measure_costs(folders, timed, task.auto_class, threads, device, settings.dtype)
    except isolated.ProcessError as error:
        raise RunFailed(
            f"the measurement of cost failed ({error}), but cost must be known: "
            "the models are kept, run distill.evaluate"
        ) from error
