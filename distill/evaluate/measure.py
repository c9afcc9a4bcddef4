"""Quality, fidelity and cost of teacher and student on one split."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from datasets import Dataset

from distill import data, isolated, models
from distill.errors import RunFailed
from distill.evaluate import quality
from distill.evaluate.console import show_on_error, status
from distill.evaluate.cost import TimedInputs, measure_costs, model_request
from distill.evaluate.inputs import ModelInputs, inputs_by_model, timed_inputs
from distill.evaluate.lm_eval_tasks import measure_harness
from distill.evaluate.measure_replies import measure_replies
from distill.evaluate.outcomes import (
    Columns,
    collect_outcomes,
    have_same_rows,
    model_batches,
    sum_by_text,
)
from distill.evaluate.records import Comparison, Fidelity, Interval, Metrics, ModelMetrics
from distill.evaluate.settings import MeasureSettings
from distill.models import has_own_code, silence_transformers, write_auto_map
from distill.prepare import Prepared
from distill.recipe import config
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
        log.info("measuring %s on %d examples: quality", _join(paths), len(examples))
        with status("measuring quality", settings.trainer.progress):
            if task.predicts_tokens and "teacher" in loaded:  # the student learns no other tokens
                models.cut_to_vocabulary(loaded["teacher"], inputs["teacher"].tokenizer, "teacher")
            measured = _measure_quality(task, loaded, inputs, examples, settings, device)
        generated = None
        if settings.evaluate.generate:
            log.info("measuring %s: replies", _join(paths))
            with status("measuring replies", settings.trainer.progress):
                raw = prepared.raw[split]
                generated = measure_replies(task, loaded, inputs, raw, settings, device)
        del loaded  # the processes that measure cost need the memory
        log.info("measuring %s: cost", _join(paths))
        threads = settings.evaluate.threads
        request = model_request(folders, task.auto_class, threads, device, settings.dtype)
        with status("measuring cost", settings.trainer.progress), _translate_failure():
            costs, machine = measure_costs(request, _timed(task, inputs, settings.evaluate))
            generation = generated.with_costs(request, settings.evaluate) if generated else {}
        metrics = Metrics(
            split=split,
            examples=len(examples),
            texts=measured.texts,
            models={
                name: ModelMetrics(measured.intervals[name], costs[name], generation.get(name))
                for name in paths
            },
            resamples=settings.evaluate.bootstrap,
            machine=machine,
            comparison=measured.comparison,
            fidelity=measured.fidelity or None,
            divergence=task.divergences[0] if measured.fidelity else None,
            replies=generated.replies if generated else None,
        )
        if not settings.evaluate.harness:
            return metrics
        log.info("measuring %s: %s", _join(paths), ", ".join(settings.evaluate.harness))
        with (
            show_on_error(metrics),
            status("measuring tasks of lm-eval", settings.trainer.progress),
        ):
            tokenizers = _saved_tokenizers(inputs, Path(temporary))
            harness = measure_harness(settings.evaluate, request, tokenizers)
    return replace(
        metrics,
        models={
            name: replace(model, harness=harness[name]) for name, model in metrics.models.items()
        },
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


class _Quality(NamedTuple):
    """The quality of the models on a split."""

    intervals: dict[str, dict[str, Interval]]  # metrics by model
    comparison: Comparison | None
    fidelity: dict[str, Fidelity]
    texts: int


def _measure_quality(
    task: Task,
    loaded: Mapping[str, Any],
    inputs: Mapping[str, ModelInputs],
    examples: Dataset,
    settings: MeasureSettings,
    device: str,
) -> _Quality:
    """Run the models on the examples of a split, and compare them."""
    plan = data.BatchPlan(examples, data.Batching(settings.evaluate.batch_size))
    batches = model_batches(task, inputs, plan)
    same_rows = have_same_rows(task, inputs)
    columns, fidelity = collect_outcomes(task, loaded, batches, device, same_rows)
    columns = {name: sum_by_text(outcomes, examples, plan) for name, outcomes in columns.items()}
    intervals, comparison = _metrics(task, columns, settings.evaluate.bootstrap, settings.seed)
    if not same_rows:  # metrics per token are not comparable
        comparison = None
    return _Quality(intervals, comparison, fidelity, len(next(iter(columns["student"].values()))))


def _metrics(
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


def _timed(
    task: Task, inputs: Mapping[str, ModelInputs], settings: config.Evaluate
) -> dict[str, TimedInputs]:
    return {name: timed_inputs(task, encoded, settings) for name, encoded in inputs.items()}


@contextmanager
def _translate_failure() -> Iterator[None]:
    try:
        yield
    except isolated.ProcessError as error:
        raise RunFailed(
            f"the measurement of cost failed ({error}), but cost must be known: "
            "the models are kept, run distill.evaluate"
        ) from error


def _saved_tokenizers(inputs: Mapping[str, ModelInputs], folder: Path) -> dict[str, Path]:
    """The folder of each model's tokenizer, saved for another process."""
    for name, source in inputs.items():
        source.tokenizer.save_pretrained(folder / f"tokenizer-{name}")
    return {name: folder / f"tokenizer-{name}" for name in inputs}
