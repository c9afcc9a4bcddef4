"""Measures the models of a run, the student in its exported format."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill.evaluate.records import Metrics
from distill.evaluate.run_folder import find_models
from distill.evaluate.settings import MeasureSettings
from distill.recipe import capabilities, config

if TYPE_CHECKING:
    from distill.packing import ExportSpec
    from distill.prepare import Prepared


def evaluate(
    run: config.Run,
    prepared: "Prepared",
    folder: Path,
    shipped: Path | None = None,
    split: str = "test",
) -> Metrics:
    """Measure the models in a run folder.

    Args:
        run: The recipe of the run.
        prepared: The data, with this split encoded.
        folder: The run folder.
        shipped: Folder of the exported student; None to measure the trained one.
        split: Split of the data.

    Raises:
        RunFailed: if a process that measures cost fails.
    """
    from distill.evaluate.measure import measure  # imports torch

    settings, paths = MeasureSettings.from_run(run), find_models(folder, run.local_teacher)
    metrics = measure(settings, prepared, paths, split, shipped)
    # Runtimes are measured by `runtimes=`; metrics.json then describes the trained student.
    is_runtime = run.export.format in capabilities.RUNTIMES
    return replace(metrics, form=asdict(config.Export() if is_runtime else run.export))


def export_spec(
    settings: config.Export, data: config.Data, prepared: "Prepared", student: Path
) -> "ExportSpec":
    """What an export needs besides the student, with its tokenizer, which may be trimmed.

    Args:
        settings: The recipe's section `export`.
        data: The recipe's section `data`.
        prepared: The data.
        student: Folder of the student.
    """
    from distill import models
    from distill.packing import ExportSpec

    tokenizer = models.load_tokenizer(str(student))
    return ExportSpec(settings, data, prepared.task, tokenizer, prepared.raw["train"])
