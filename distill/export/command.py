"""The command `distill export`: exports the student of a run folder, also in other formats."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill import cli, evaluate, isolated, store
from distill.errors import UserError
from distill.export.draft import export
from distill.places import check_writable
from distill.recipe import capabilities, compose, config, memory_keys

if TYPE_CHECKING:
    from distill.prepare import Prepared
    from distill.tasks.base import Task

USAGE = """Exports the student of a finished run as a folder that others can use, once it is proven.

  python -m distill.export run=FOLDER [key=value ...]     a finished run; writes FOLDER/export
  python -m distill.export packed=FOLDER to=FOLDER        converts an export of format=packed
                                                          to ordinary weights

Keys; the recipe's values under export are the defaults, or with format= those of the format:
  format=            dense: one float per weight; packed: 2 to 8 bits per weight
                     torchao: int8 weights, loads where torchao is installed
                     lora: the adapter of student.lora alone, loads where peft is installed
                     onnx, openvino, executorch: for these runtimes, without torch and transformers
  dtype=             float type of weights that are not quantized: float32, bfloat16, float16;
                     auto: that of the teacher's checkpoint
  quantize=          quantizes what training did not: weights: weights only
                     dynamic, static: weights, and inputs of linear layers to 8 bits
                     int8: for a runtime, its default
  bits=              bits per weight of quantize=, 2 to 8
  examples=          number of held-out texts that the proof compares
  smaller=           false allows an export that is no smaller than the teacher
"""


@dataclass
class Options:
    """The command line; None stands for the recipe's value."""

    run: str | None = None
    packed: str | None = None
    to: str | None = None
    format: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    bits: int | None = None
    examples: int | None = None
    smaller: bool | None = None


@cli.cli_command
def main() -> None:
    """Read the command line, export, and print the folder."""
    options = cli.parse_options(Options, USAGE)
    if options.packed is not None:
        _unpack(options)
        return
    if options.run is None:
        raise UserError(
            "run is not given, but there must be something to export: "
            "add run=FOLDER, such as run=runs/NAME/TIME"
        )
    print(f"export: {export_folder(evaluate.check_run_folder(options.run), options)}")


def export_folder(folder: Path, options: Options) -> Path:
    """Export the student of a run folder.

    Args:
        folder: the folder of a finished run.
        options: override the recipe's section `export`.

    Returns:
        The folder of the export.

    Raises:
        UserError: if another process is working in the folder.
    """
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    run = replace(run, export=choose_settings(run.export, options))
    settings, techniques = run.export, capabilities.techniques_of(run.callbacks)
    memory_keys.check_memory_keys(run)
    capabilities.check_export(settings.format, settings.dtype, settings.quantize, settings.bits)
    capabilities.check_techniques(settings.format, settings.quantize, techniques)
    # These import torch: only once the command line is right.
    from distill import models
    from distill.packing import ExportSpec
    from distill.tasks import build_task

    settings = models.resolve_export_dtype(settings, run.teacher, run.student)
    run = replace(run, export=settings)
    task = build_task(run.task)
    check_writable(folder, "run")
    warm = isolated.warm_process(task.auto_class, run.evaluate.threads)
    with store.exclusive_access(folder), warm:
        inputs = prepared(task, run.data, run.seed, folder)
        spec = ExportSpec(settings, run.data, inputs.task, inputs.tokenizer, inputs.raw["train"])
        final = export(run, spec, inputs.raw["test"], folder, evaluate.read_metrics(folder))
    assert final is not None  # a format is chosen
    return final


def choose_settings(settings: config.Export, options: Options) -> config.Export:
    """The recipe's section `export` with the options; another format starts from its defaults."""
    values = {key.name: getattr(options, key.name) for key in fields(config.Export)}
    overrides = {name: value for name, value in values.items() if value is not None}
    if options.format is not None:
        settings = config.Export(examples=settings.examples)
    return replace(settings, **({"format": settings.format or "dense"} | overrides))


def prepared(task: "Task", data: config.Data, seed: int, folder: Path) -> "Prepared":
    """The data of a run, with the tokenizer of its student.

    Args:
        task: the task of the recipe.
        data: its section `data`.
        seed: its seed, which draws the splits that are held out.
        folder: the run folder.
    """
    from distill import models
    from distill.prepare import prepare

    student = str(folder / "student")
    tokenizers = models.Tokenizers(models.load_tokenizer(student))
    return prepare(task, data, seed, tokenizers, splits=(), model=student)


def _unpack(options: Options) -> None:
    if options.run is not None or options.to is None:
        raise UserError(
            f"packed is {options.packed}, but run is {options.run} and to is {options.to}: "
            "give packed=FOLDER to=FOLDER alone"
        )
    from distill.packing.packed import to_dense

    print(f"export: {to_dense(Path(str(options.packed)), Path(options.to))}")
