"""A student in several runtimes, beside its teacher: bytes, agreement, quality, latency, memory.

Each runtime predicts all texts in a separate process; then one process times all, in turns.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from torch import Tensor

from distill import data, isolated
from distill.errors import RunFailed, UserError
from distill.evaluate import quality
from distill.evaluate.console import status
from distill.evaluate.cost import DTYPE
from distill.evaluate.inputs import evenly_spaced, trimmed_tokenizer
from distill.evaluate.records import Cost, Interval, Machine, RuntimeMetrics, RuntimesReport
from distill.evaluate.runtime_names import TORCH
from distill.evaluate.runtime_setup import RuntimeModel, export_model, torch_model, torch_variant
from distill.evaluate.settings import MeasureSettings
from distill.packing.export_spec import ExportSpec
from distill.prepare import Prepared
from distill.recipe import config
from distill.tasks.base import Task
from distill.tasks.batch import Batch

log = logging.getLogger("distill")

MIN_AGREEMENT = 0.97  # share of the trained student's predictions that the fastest must keep

Texts = list[list[str]]  # one cell of each text, or two for pairs


def measure_runtimes(
    settings: MeasureSettings,
    prepared: Prepared,
    paths: Mapping[str, str],
    split: str,
    runtimes: Sequence[str],
    skip_failing: bool = False,
) -> RuntimesReport:
    """Measure a student in runtimes.

    Args:
        settings: How it is measured.
        prepared: The data.
        paths: Folder or name of `teacher`, which may be left out, and of `student`.
        split: Split of the data.
        runtimes: Names of the runtimes.
        skip_failing: Leave out a runtime that fails, with a warning, rather than raise.

    Returns:
        Ratios refer to the teacher, or without one to the student, in PyTorch in float32.

    Raises:
        UserError, RunFailed: if a runtime does not support the student or fails.
    """
    task, raw = prepared.task, prepared.raw[split]
    tokenizer = trimmed_tokenizer(paths["student"], prepared.tokenizer) or prepared.tokenizer
    spec = ExportSpec(config.Export(), settings.data, task, tokenizer, prepared.raw["train"])
    texts = task.requests(raw, settings.data, tokenizer)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            name: torch_model(task, model_tokenizer, paths[name], folder / f"{name}.json")
            for name, model_tokenizer in (
                ("student", tokenizer),
                ("teacher", prepared.for_teacher().tokenizer),
            )
            if name in paths
        }
        responses = {
            name: _predict(model, texts, settings.evaluate) for name, model in models.items()
        }
        log.info("measuring %s", ", ".join(runtimes))
        for name in runtimes:
            with _skipping(name, skip_failing):
                if name in TORCH:
                    model = torch_variant(models["student"], name)
                else:
                    with status(f"writing the student for {name}", settings.trainer.progress):
                        model = export_model(spec, Path(paths["student"]), name, folder / name)
                if model == models["student"]:
                    responses[name] = responses["student"]
                else:
                    responses[name] = _predict(model, texts, settings.evaluate)
                models[name] = model
        measured = [name for name in runtimes if name in models]
        baseline = "teacher" if "teacher" in paths else "student"
        truncated = [task.truncate_request(cells, tokenizer) for cells in texts]
        with status("timing the runtimes", settings.trainer.progress):
            timed = {name: models[name] for name in (baseline, *measured)}
            costs, machine = _time(timed, truncated, settings.evaluate)
    batches = _encode(spec, raw, settings.evaluate.batch_size)
    results = {}
    for name, cost in costs.items():
        predictions, reference = (responses[model]["predictions"] for model in (name, "student"))
        agreed_N, outcomes = task.compare_answers(predictions, reference, batches)
        results[name] = RuntimeMetrics(
            weight_bytes=models[name].weight_bytes,
            agreement=_share(agreed_N),
            quality=_intervals(task, outcomes, settings.evaluate.bootstrap, settings.seed),
            cost=Cost(**cost, **responses[name]["cost"]),
        )
    fastest = find_fastest({name: results[name] for name in measured})
    return RuntimesReport(len(raw), baseline, task.primary_metric, results, fastest, machine)


@contextmanager
def _skipping(name: str, skip: bool) -> Iterator[None]:
    """Log the failure of a runtime as a warning if it may be left out."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if not skip:
            raise
        log.warning("%s is left out: %s", name, error)


def find_fastest(results: Mapping[str, RuntimeMetrics]) -> dict[str, str]:
    """The fastest runtimes by latency and throughput, among those with enough agreement."""
    costs = {
        name: metrics.cost
        for name, metrics in results.items()
        if metrics.agreement.value >= MIN_AGREEMENT
    }
    if not costs:
        return {}
    latency = min(costs, key=lambda name: costs[name].latency_p50_ms or math.inf)
    throughput = max(costs, key=lambda name: costs[name].examples_per_s or 0)
    return {"latency": latency, "throughput": throughput}


def _predict(model: RuntimeModel, texts: Texts, settings: config.Evaluate) -> dict[str, Any]:
    """Predictions for all texts, in the same batches for every model, and peak memory."""
    request = {"batches": _split(texts, settings.batch_size), "answer": model.answer}
    return _run("runtime_predictions", {model.form: model}, settings.threads, request)


def _time(
    models: Mapping[str, RuntimeModel], texts: Texts, settings: config.Evaluate
) -> tuple[dict[str, dict[str, Any]], Machine]:
    """Time single texts, evenly spaced, and full batches of texts of similar length."""
    size = min(settings.batch_size, len(texts))
    spread = [texts[index] for index in evenly_spaced(len(texts), size * settings.batches)]
    spread.sort(key=lambda cells: sum(map(len, cells)))
    request = {
        "requests": [[texts[index]] for index in evenly_spaced(len(texts), settings.requests)],
        "batches": [batch for batch in _split(spread, size) if len(batch) == size],
        "dtype": DTYPE,
        "attention": "eager",
        "device": "cpu",
    }
    response = _run("time_runtimes", models, settings.threads, request)
    return response["costs"], Machine.from_json(response["machine"])


def _split(texts: Texts, size: int) -> list[Texts]:
    return [texts[first : first + size] for first in range(0, len(texts), size)]


def _run(
    script: str, models: Mapping[str, RuntimeModel], threads: int, request: dict[str, Any]
) -> dict[str, Any]:
    described = {name: asdict(model) for name, model in models.items()}
    try:
        return isolated.run_isolated(script, {"models": described, "threads": threads} | request)
    except isolated.ProcessError as error:
        raise RunFailed(
            f"the measurement of {', '.join(models)} failed ({error}), but each runtime must run: "
            "leave it out of runtimes="
        ) from error


def _encode(spec: ExportSpec, raw: Dataset, size: int) -> list[Batch]:
    """The encoded texts in the batches in which runtimes predict them."""
    columns = spec.task.encode_requests(raw[:], spec.tokenizer, spec.data, keep_end=True)
    examples, pad_id = data.columns_to_examples(columns), spec.tokenizer.pad_token_id
    return [
        spec.task.collate(examples[first : first + size], pad_id)
        for first in range(0, len(examples), size)
    ]


def _share(agreed_N: Tensor) -> Interval:
    share = float(agreed_N.double().mean())
    return Interval(share, *quality.share_interval(share, len(agreed_N)))


def _intervals(
    task: Task, outcomes: quality.Columns | None, resamples: int, seed: int
) -> dict[str, Interval]:
    if outcomes is None:  # metrics need all logits
        return {}
    return quality.bootstrap(task, outcomes, resamples, seed).intervals()
