"""`distill evaluate`: measures the models of a run, or others, and stores the metrics."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import cli, store
from distill.errors import UserError
from distill.evaluate import runtime_names
from distill.evaluate.console import show, show_on_error
from distill.evaluate.evaluate_run import evaluate, export_spec
from distill.evaluate.records import Metrics, RuntimesReport
from distill.evaluate.run_folder import (
    check_run_folder,
    find_models,
    read_metrics,
    write_metrics,
    write_report,
)
from distill.evaluate.settings import MeasureSettings
from distill.isolated import warm_process
from distill.places import check_writable
from distill.recipe import compose, config
from distill.stages import Stages
from distill.tasks import build_task

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from distill.models import Tokenizers
    from distill.prepare import Prepared
    from distill.tasks.base import Task

AUTO = "auto"  # value of `runtimes=`: those that are likely to be fast
SPLITS = ("train", "validation", "test")
USAGE = """Measures a student, and its teacher: quality, fidelity, latency, memory, bytes on disk.

  distill evaluate run=FOLDER [key=value ...]
      a finished run; writes FOLDER/metrics.json
  distill evaluate run=FOLDER runtimes=torch,onnx_int8,...
      the student in runtimes; writes FOLDER/runtimes.json
  distill evaluate recipe=NAME student=FOLDER [teacher=FOLDER] [key=value ...]
      other models on a recipe's data; folders or names

Keys and their defaults:
  split=test         train, validation or test
  output=            file for the metrics; run= with the test split writes into the run folder
  runtimes=          torch, onnx, openvino, executorch; with a suffix for the variant, as in
                     torch_bf16, torch_compile, onnx_int8, onnx_static, openvino_bf16;
                     auto: those that are likely to be fast, are installed and can run the student
  batch_size=        examples per batch; this key and those below: the recipe's, under evaluate
  bootstrap=         resamples behind each 95 % interval
  requests=          timed single requests
  batches=           timed batches
  threads=           CPU threads of the timed processes
  generate=          true: replies of language models, their quality, times, cache and memory
  max_new_tokens=    tokens of a reply, at most
  harness=           tasks of lm-eval, as in arc_easy,hellaswag
  harness_path=      folder with more of its tasks
  harness_limit=     examples of each of these tasks
"""


@dataclass
class Options:
    """The command line; None stands for the recipe's value."""

    run: str | None = None
    recipe: str | None = None
    teacher: str | None = None
    student: str | None = None
    split: str = "test"
    output: str | None = None
    runtimes: Any = None
    batch_size: int | None = None
    bootstrap: int | None = None
    requests: int | None = None
    batches: int | None = None
    threads: int | None = None
    generate: bool | None = None
    max_new_tokens: int | None = None
    harness: Any = None
    harness_path: str | None = None
    harness_limit: int | None = None

    @property
    def measured_run(self) -> Path | None:
        """The run folder in which the result is stored; None if it is stored elsewhere."""
        if self.output is not None or self.run is None or self.split != "test":
            return None
        return Path(self.run).expanduser()


@cli.cli_command
def main() -> None:
    """Read the command line, measure, print and store."""
    options = cli.parse_options(Options, USAGE)
    run, paths = read_options(options)
    runtimes = read_runtimes(options.runtimes, run.callbacks)
    from distill import models  # imports torch
    from distill.evaluate.lm_eval_tasks import check_settings
    from distill.prepare import prepare

    if options.run is None:
        run = replace(run, export=_dtype_of_model(run.export, paths))
    run = replace(run, export=models.resolve_export_dtype(run.export, run.teacher, run.student))
    task = build_task(run.task)
    check_settings(run.evaluate, task)
    tokenizers = load_tokenizers(paths, task, run.loss.compares_spans)
    named = next(iter(paths.values()))  # the teacher, if there is one
    warm = nullcontext() if runtimes else warm_process(task.auto_class, run.evaluate.threads)
    folder = options.measured_run
    alone = nullcontext() if folder is None else store.exclusive_access(folder)
    with alone, warm:
        prepared = prepare(task, run.data, run.seed, tokenizers, [options.split], named)
        if options.run is not None:
            _warn_of_other_holdout(Path(options.run).expanduser(), run.data, prepared.task)
        if runtimes:
            settings = MeasureSettings.from_run(run)
            show(_measure_runtimes(options, settings, prepared, paths, runtimes))
        else:
            show(_measure(options, run, prepared, paths))


def _warn_of_other_holdout(folder: Path, settings: config.Data, task: "Task") -> None:
    """Warn if the run held out other examples than would be drawn now."""
    from distill.data import HOLDOUT_VERSION  # imports torch

    drawn = task.names and settings.label and None in (settings.validation, settings.test)
    if drawn and Stages(folder, writes=False).results.get("holdout") != HOLDOUT_VERSION:
        log.warning(
            "%s was trained by a version that held out other examples: those measured now may be "
            "among its training examples",
            folder,
        )


def _dtype_of_model(settings: config.Export, paths: dict[str, str]) -> config.Export:
    """The recipe's export, with the dtype of the teacher, or of the student alone."""
    from distill import models

    name = "teacher" if "teacher" in paths else "student"
    return models.with_dtype_of(settings, paths[name], name)


def _measure(
    options: Options, run: config.Run, prepared: "Prepared", paths: dict[str, str]
) -> Metrics:
    """Measure the models and store the metrics; a run keeps the fields from its training."""
    from distill.evaluate.measure import measure  # imports torch
    from distill.packing import temporary_artefact

    if options.run is None:
        metrics = measure(MeasureSettings.from_run(run), prepared, paths, options.split)
    else:
        folder, student = Path(options.run).expanduser(), Path(paths["student"])
        spec = export_spec(run.export, run.data, prepared, student)
        with temporary_artefact(spec, student) as shipped:
            metrics = evaluate(run, prepared, folder, shipped, options.split)
    if options.output is not None:
        with show_on_error(metrics):
            write_metrics(metrics, Path(options.output))
    elif options.measured_run is not None:
        earlier = read_metrics(folder)
        if earlier is not None:
            metrics = replace(metrics, training=earlier.training, stages=earlier.stages)
        with show_on_error(metrics):
            write_metrics(metrics, folder)
            write_report(metrics, folder)
    return metrics


def _measure_runtimes(
    options: Options,
    settings: MeasureSettings,
    prepared: "Prepared",
    paths: dict[str, str],
    runtimes: list[str],
) -> RuntimesReport:
    """Measure the student in runtimes and store the report."""
    from distill.evaluate.runtimes import measure_runtimes  # imports torch

    is_auto = _split_list(options.runtimes) == [AUTO]
    report = measure_runtimes(settings, prepared, paths, options.split, runtimes, is_auto)
    if options.output is not None:
        with show_on_error(report):
            write_metrics(report, Path(options.output))
    elif options.measured_run is not None:
        with show_on_error(report):
            write_metrics(report, options.measured_run)
    return report


def read_runtimes(value: Any, callbacks: dict[str, Any]) -> list[str]:
    """The runtimes of the option `runtimes`; empty without it.

    Raises:
        UserError: if one does not exist, is not installed, or does not support the student.
    """
    if value is None:
        return []
    names = _split_list(value)
    if names == [AUTO]:
        names = runtime_names.available_runtimes(callbacks)
    runtime_names.check_runtimes(names, callbacks)
    return names


def _split_list(value: Any) -> list[str]:
    """Split `a,b`, or return `[a,b]`, as parsed from a command line."""
    return [str(item) for item in (value if isinstance(value, list) else str(value).split(","))]


def read_options(options: Options) -> tuple[config.Run, dict[str, str]]:
    """The recipe with the options applied, and the folder or name of each model.

    Raises:
        UserError: if options contradict each other, or name something that does not exist.
    """
    if options.split not in SPLITS:
        raise UserError(
            f"split is {options.split}, but there is no such split: choose from {', '.join(SPLITS)}"
        )
    if (options.run is None) == (options.recipe is None):
        raise UserError(
            f"run is {options.run} and recipe is {options.recipe}, but exactly one is needed: "
            "give run=FOLDER, or recipe=NAME student=FOLDER"
        )
    if options.output and not Path(options.output).resolve().parent.is_dir():
        raise UserError(
            f"output is {options.output}, but its folder does not exist: create or change it"
        )
    run, paths = _read_recipe(options) if options.run is None else _read_run(options)
    if options.output:
        check_writable(Path(options.output).resolve().parent, "output")
    elif options.measured_run is not None:
        check_writable(options.measured_run, "run")
    settings = {
        key.name: getattr(options, key.name)
        for key in fields(config.Evaluate)
        if getattr(options, key.name) is not None
    }
    if options.harness is not None:
        settings["harness"] = _split_list(options.harness)
    return replace(run, evaluate=replace(run.evaluate, **settings)), paths


def _read_recipe(options: Options) -> tuple[config.Run, dict[str, str]]:
    run = compose.load_recipe(str(options.recipe))
    if options.student is None:
        raise UserError(f"recipe is {options.recipe}, but student is missing: add student=FOLDER")
    models = {"teacher": options.teacher, "student": options.student}
    paths = {name: path for name, path in models.items() if path is not None}
    for name, path in paths.items():
        has_scheme = path.startswith("package:")
        is_folder = path.startswith((".", "/", "~")) or (path.count("/") > 1 and not has_scheme)
        if is_folder and not Path(path).expanduser().exists():
            raise UserError(
                f"{name} is {path}, but there is no such folder: "
                "give one in the format of transformers, or a name"
            )
    return run, paths


def _read_run(options: Options) -> tuple[config.Run, dict[str, str]]:
    if options.teacher or options.student:
        raise UserError(
            f"run is {options.run}, but teacher or student is given too: "
            "leave them out, the models of the run are measured"
        )
    folder = check_run_folder(str(options.run))
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    return run, find_models(folder, run.local_teacher)


def load_tokenizers(paths: dict[str, str], task: "Task", spans: bool = False) -> "Tokenizers":
    """The tokenizers of student and teacher; the student's as it was before it was trimmed.

    Args:
        paths: folder or name of each model.
        task: decides whether their tokens may differ.
        spans: whether they may differ all the same, see `Loss.compares_spans`.

    Raises:
        UserError: if the models predict tokens and have other vocabularies.
    """
    from distill import models  # imports torch
    from distill.evaluate.inputs import trimmed_tokenizer

    loaded = {name: models.load_tokenizer(path, name) for name, path in paths.items()}
    student = loaded["student"]
    for name in ("dense", "teacher"):
        if name in loaded and trimmed_tokenizer(paths["student"], loaded[name]) is not None:
            student = loaded[name]
            break
    if "teacher" not in loaded or student is loaded["teacher"]:
        return models.Tokenizers(student)
    return models.pair_tokenizers(student, loaded["teacher"], task, loaded["teacher"], spans)
