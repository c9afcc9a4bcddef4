"""The models and the measurements in the folder of a run."""

import json
import logging
from pathlib import Path

from distill import store
from distill.errors import UserError
from distill.evaluate.records import MODELS, Metrics, RuntimesReport
from distill.recipe import config

log = logging.getLogger("distill")

METRICS, REPORT, RUNTIMES = "metrics.json", "report.md", "runtimes.json"


def check_run_folder(path: str) -> Path:
    """The folder of a run that has a recipe and a student.

    Raises:
        UserError: if it has not.
    """
    folder = Path(path).expanduser()
    way_out = "give the folder of a run, such as runs/NAME/TIME"
    if not folder.is_dir():
        raise UserError(f"run is {path}, but there is no such folder: {way_out}")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run is {path}, but it holds no recipe.yaml: {way_out}")
    if not (folder / "student" / "config.json").is_file():
        raise UserError(
            f"run is {path}, but it holds no trained student: finish its training first"
        )
    return folder


def find_models(folder: Path, teacher: config.Teacher | None) -> dict[str, str]:
    """Folders of `teacher`, `dense` (the student before it was compressed) and `student`.

    A pretrained teacher without fine-tuning has no folder in the run; its name is returned.

    Raises:
        UserError: if the folder of a teacher that the run trained or initialized is missing.
    """
    paths = {name: str(folder / name) for name in MODELS if (folder / name).is_dir()}
    if teacher is None:
        paths.pop("teacher", None)
    elif "teacher" not in paths:
        if teacher.model is None or teacher.finetune is not None:
            raise UserError(
                f"run is {folder}, but its folder teacher, with the teacher that it made, is "
                "missing: restore it, or start a new run"
            )
        paths = {"teacher": str(teacher.model)} | paths
    return paths


def read_metrics(folder: Path) -> Metrics | None:
    """The metrics of a run; None if there are none, or with a warning if the file is damaged."""
    file = folder / METRICS
    if not file.is_file():
        return None
    try:
        return Metrics.from_json(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s): the run counts as not measured", file, error)
        return None


def write_metrics(metrics: Metrics | RuntimesReport, path: Path) -> None:
    """Write to a file, or into a folder under the usual name; the file is replaced in one step."""
    if path.is_dir():
        path = path / (METRICS if isinstance(metrics, Metrics) else RUNTIMES)
    text = json.dumps(metrics.to_json(), indent=1, allow_nan=False)
    store.write_file(path, f"{text}\n".encode())


def write_report(metrics: Metrics, folder: Path) -> None:
    """Write the table as Markdown into a run folder."""
    from distill.evaluate.table import markdown

    (folder / REPORT).write_text(markdown(metrics) + "\n")
