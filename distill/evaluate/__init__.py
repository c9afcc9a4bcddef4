"""`python -m distill.evaluate`: what teacher and student are worth, and what they cost, as a table and as metrics.json."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import cli, store
from distill.errors import UserError
from distill.recipe import compose, config
from distill.stages import show_progress

if TYPE_CHECKING:
    from datasets import Dataset

    from distill.tasks.base import Task

log = logging.getLogger("distill")

METRICS, REPORT = "metrics.json", "report.md"
RUNTIMES = "runtimes.json"
OF_TRAINING = ("training", "stages")  # what only training can tell: measuring a run again keeps it
SPLITS = ("train", "validation", "test")
USAGE = """Measures a student, and its teacher where there is one: quality, fidelity, latency, throughput, memory, bytes on disk.

  python -m distill.evaluate run=FOLDER [key=value ...]                             a finished run; writes FOLDER/metrics.json
  python -m distill.evaluate run=FOLDER runtimes=torch,onnx_int8,...                the student in runtimes; writes FOLDER/runtimes.json
  python -m distill.evaluate recipe=NAME student=FOLDER [teacher=FOLDER] [...]      other models on a recipe's data; folders or names

Keys and their defaults:
  split=test         train, validation or test
  output=            file for the metrics; run= with the test split writes metrics.json into the run folder
  runtimes=          torch, onnx, openvino, executorch; with how, as in torch_bf16, torch_compile, onnx_int8, onnx_static, openvino_bf16;
                     auto: what is likely to be fast, is installed and can run the student; the fastest that is correct is named
  batch_size=        examples per batch; this key and those below: the recipe's, under evaluate
  bootstrap=         resamples behind each 95 % interval
  requests=          timed single requests
  batches=           timed batches
  threads=           CPU threads of the timed processes
"""


@dataclass
class Options:
    """The command line; what is null is the recipe's."""

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


def evaluate(
    run: config.Run, task: "Task", raw: "Dataset", examples: "Dataset", tokenizer: Any, folder: Path
) -> dict[str, Any]:
    """Measure the models of a run folder on the test split, raw and encoded: what metrics.json holds."""
    from distill.evaluate.measure import measure

    return measure(
        run, task, raw, examples, tokenizer, of_run(run, folder), "test", as_exported=True
    )


def of_run(run: config.Run, folder: Path) -> dict[str, str]:
    """The models of a run folder: teacher, the student before it was compressed, and student, as far as they are there.

    A teacher that was taken as it is has no folder there, but a name.
    """
    names = {
        what: str(folder / what)
        for what in ("teacher", "dense", "student")
        if (folder / what).is_dir()
    }
    if run.teacher is None:
        names.pop("teacher", None)
    elif "teacher" not in names:
        names = {"teacher": str(run.teacher.model)} | names
    return names


def write(metrics: dict[str, Any], file: Path) -> None:
    """Store the metrics in a file, or as metrics.json in a folder, with null for NaN; an earlier file is replaced in one step."""
    from distill.evaluate.measure import finite

    file = file / METRICS if file.is_dir() else file
    store.write_file(file, (json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n").encode())


def report(metrics: dict[str, Any], folder: Path) -> None:
    """The table as Markdown, beside metrics.json."""
    from distill.evaluate.table import markdown

    (folder / REPORT).write_text(markdown(metrics) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """What a run folder's metrics.json holds; nothing where there is none, or where it is damaged."""
    file = folder / METRICS
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        log.warning("%s is damaged (%s): it is taken for not measured", file, error)
        return {}


@contextmanager
def status(run: config.Run, said: str) -> Iterator[None]:
    """A sign of life in a terminal while nothing else is said; few pictures a second, for times are measured meanwhile."""
    if not show_progress(run.trainer.progress):
        yield
        return
    from rich.console import Console

    with Console().status(said, refresh_per_second=2):
        yield


def show(metrics: dict[str, Any], folder: Path | None = None, artefact: Path | None = None) -> None:
    """Print the table, and where the results are."""
    from rich.console import Console

    from distill.evaluate import table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table.of_runtimes(metrics) if "runtimes" in metrics else table.table(metrics))
    for what, path in (("run", folder), ("export", artefact)):
        if path is not None:
            console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


@cli.cli_command
def main() -> None:
    """Read the command line, measure, print and store."""
    given = cli.parse_options(Options, USAGE)
    run, names = described(given)
    if given.runtimes is not None:
        in_runtimes(given, run, names, _listed(given.runtimes))
        return
    from distill.evaluate.measure import measure  # imports torch: only once the command line holds

    task, raw, examples, tokenizer = prepared(run, names, given.split)
    metrics = measure(
        run, task, raw, examples, tokenizer, names, given.split, as_exported=given.run is not None
    )
    if given.output is not None:
        write(metrics, Path(given.output))
    elif given.run is not None and given.split == "test":
        folder = Path(given.run).expanduser()
        earlier = read(folder)
        write(metrics | {key: earlier[key] for key in OF_TRAINING if key in earlier}, folder)
        report(metrics, folder)
    show(metrics)


def _listed(given: Any) -> list[str]:
    """`a,b` or `[a,b]`, as a command line has them."""
    return [str(name) for name in (given if isinstance(given, list) else str(given).split(","))]


def in_runtimes(given: Options, run: config.Run, names: dict[str, str], wanted: list[str]) -> None:
    """Measure the student in these runtimes, print and store."""
    from distill.evaluate import runtime_names

    automatic = wanted == ["auto"]
    wanted = runtime_names.available_runtimes(run) if automatic else wanted
    runtime_names.check_runtimes(run, wanted)
    from distill.evaluate import runtimes  # imports torch: only once the command line holds

    task, raw, _, tokenizer = prepared(run, names, given.split)
    metrics = runtimes.measure(run, task, raw, tokenizer, names, wanted, tried=automatic)
    if given.output is not None:
        write(metrics, Path(given.output))
    elif given.run is not None and given.split == "test":
        write(metrics, Path(given.run).expanduser() / RUNTIMES)
    show(metrics)


def described(given: Options) -> tuple[config.Run, dict[str, str]]:
    """The recipe with the options laid over it, and the models to measure; what does not fit together is refused."""
    if given.split not in SPLITS:
        raise UserError(
            f"split is {given.split}, but there is no such split: choose from {', '.join(SPLITS)}"
        )
    if (given.run is None) == (given.recipe is None):
        raise UserError(
            f"run is {given.run} and recipe is {given.recipe}, but exactly one is needed: give run=FOLDER, or recipe=NAME student=FOLDER"
        )
    if given.output and not Path(given.output).resolve().parent.is_dir():
        raise UserError(
            f"output is {given.output}, but its folder does not exist: make it, or name another"
        )
    run, names = _of_recipe(given) if given.run is None else _of_folder(given)
    chosen = {
        each.name: getattr(given, each.name)
        for each in fields(config.Evaluate)
        if getattr(given, each.name) is not None
    }
    return replace(run, evaluate=replace(run.evaluate, **chosen)), names


def _of_recipe(given: Options) -> tuple[config.Run, dict[str, str]]:
    run = compose.load_recipe(str(given.recipe))
    if given.student is None:
        raise UserError(f"recipe is {given.recipe}, but student is not given: add student=FOLDER")
    names = {
        what: name
        for what, name in (("teacher", given.teacher), ("student", given.student))
        if name is not None
    }
    for what, name in names.items():
        if not Path(name).expanduser().exists() and (
            name.startswith((".", "/", "~")) or name.count("/") > 1
        ):
            raise UserError(
                f"{what} is {name}, but there is no such folder: give one in the format of transformers, or a name"
            )
    return run, names


def _of_folder(given: Options) -> tuple[config.Run, dict[str, str]]:
    if given.teacher or given.student:
        raise UserError(
            f"run is {given.run}, but teacher or student is given too: they are those of the run folder, leave them out"
        )
    folder = finished(str(given.run))
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    return run, of_run(run, folder)


def finished(name: str) -> Path:
    """The folder of a run that has a recipe and a student; UserError otherwise."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"run is {name}, but there is no such folder: give the folder of a run, such as runs/NAME/TIME"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"run is {name}, but it holds no recipe.yaml: give the folder of a run, such as runs/NAME/TIME"
        )
    if not (folder / "student" / "config.json").is_file():
        raise UserError(
            f"run is {name}, but it holds no trained student: finish its training first"
        )
    return folder


def prepared(run: config.Run, names: dict[str, str], split: str) -> tuple[Any, Any, Any, Any]:
    """Task, one split, raw and encoded, and tokenizer, made again from the recipe.

    UserError where the models read other token ids, but for a student whose vocabulary is the others' trimmed.
    """
    from datasets import DatasetDict

    from distill import data, models
    from distill.evaluate.measure import trimmed_tokenizer
    from distill.recipe import targets

    task = targets.instantiate(run.task)
    first, *others = names
    tokenizer = models.load_tokenizer(names[first], first)
    for what in others:
        if what != "student" or trimmed_tokenizer(names[what], tokenizer) is None:
            models.check_tokens(models.load_tokenizer(names[what], what), tokenizer, (what, first))
    raw = data.load(run.data, task, run.seed)
    encoded = data.encode(DatasetDict({split: raw[split]}), task, tokenizer, run.data)
    return task, raw[split], encoded[split], tokenizer
