"""`python -m distill.export`: the student as a folder that plain transformers loads, under its name only once it is proven.

It is written beside its final name, loaded in a fresh process that cannot import this library, and asked held-out texts. Only if
it answers as the trained student does, and takes fewer bytes than the teacher, is it renamed; an earlier export stays until then.
"""

import json
import logging
import os
import secrets
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill import cli, evaluate, isolated, store
from distill.errors import UserError
from distill.evaluate.cost import weight_bytes
from distill.export.card import card
from distill.export.checks import check_equal, failed, smaller
from distill.recipe import capabilities, compose, config

if TYPE_CHECKING:
    from datasets import Dataset

    from distill.tasks.base import Task

log = logging.getLogger("distill")

FINAL = "export"
TOLERANCE = (
    1e-4  # largest difference of logits, relative to the largest logit, of an export in float32
)
AGREEMENT = 0.99  # share of predictions that an export of fewer bits keeps
USAGE = """Exports the student of a finished run as a folder that plain transformers loads, once it is proven.

  python -m distill.export run=FOLDER [key=value ...]     a finished run; writes FOLDER/export
  python -m distill.export packed=FOLDER to=FOLDER        an export of format=packed, as a folder of ordinary weights

Keys, which default to the recipe's, under export; beside format= to what is usual for it:
  format=            dense: one float a weight; torchao: int8, loads where torchao is installed; packed: 2 to 8 bits a weight
                     onnx, openvino, executorch: for these runtimes, without torch and transformers
  dtype=             of what is stored unquantized: float32, bfloat16, float16
  quantize=          what is not quantized yet: weights; dynamic or static: weights, and inputs of linear layers to 8 bits
                     for a runtime also int8, which is what suits it; weights quantized in training keep their codes
  bits=              a weight of quantize=, 2 to 8
  examples=          number of held-out texts that the proof compares
"""


@dataclass
class Options:
    """The command line; what is null is the recipe's."""

    run: str | None = None
    packed: str | None = None
    to: str | None = None
    format: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    bits: int | None = None
    examples: int | None = None


def export(
    run: config.Run,
    task: "Task",
    texts: "Dataset",
    tokenizer: Any,
    folder: Path,
    metrics: dict[str, Any] | None = None,
) -> Path | None:
    """Write, prove and name the export of a run folder's student; `texts` is the raw test split. Null where the recipe wants none.

    RunFailed says which of loadable, equal and smaller does not hold; nothing new is then under the final name.
    """
    if run.export.format is None:
        return None
    from distill import packing

    final = folder / FINAL
    with draft_folder(final) as draft, TemporaryDirectory() as temporary:
        student = packing.final_student(run, task, tokenizer, folder / "student", Path(temporary))
        packing.write_format(run, task, tokenizer, student, draft)
        with evaluate.status(run, "proving the export"):
            proof = prove(run, task, texts, tokenizer, folder, student, draft)
        describe(run, task, draft, proof, metrics)
        publish(draft, final)
    log.info("export: %s, %.2f MB, proven on %d texts", final, proof["bytes"] / 1e6, proof["texts"])
    if "faster" in proof:
        fast = proof["faster"]
        log.info(
            "it is fastest here in %s: %.1f ms a text instead of %.1f",
            fast["dtype"],
            fast["latency_p50_ms"],
            proof["latency_p50_ms"],
        )
    return final


@contextmanager
def draft_folder(final: Path) -> Iterator[Path]:
    """A folder beside the final one; whatever happens, nothing is left of it."""
    draft = final.with_name(f".{final.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def prove(
    run: config.Run,
    task: "Task",
    texts: "Dataset",
    tokenizer: Any,
    folder: Path,
    student: Path,
    draft: Path,
) -> dict[str, Any]:
    """Loadable, equal to `student`, smaller, in this order: what proof.json holds, or RunFailed."""
    from distill import models
    from distill.evaluate.measure import evenly_spaced
    from distill.export import runtime_proof

    texts = texts.select(evenly_spaced(len(texts), run.export.examples))
    if run.export.format in capabilities.RUNTIMES:
        return runtime_proof.prove(run, task, texts, tokenizer, folder, draft)
    told = _loadable(run, task, texts, tokenizer, folder, draft)
    stored = told["answers"].pop("stored")
    answers = _equal(run, task, texts, tokenizer, folder, student, stored)
    sizes = smaller(run, folder, draft)
    latency: dict[str, Any] = {"latency_p50_ms": _median_ms(stored)}
    for dtype, others in told["answers"].items():
        if (spent := _median_ms(others)) < latency["latency_p50_ms"]:
            agreement = _compared(run, task, texts, tokenizer, student, others, folder).agreement
            latency |= (
                {"faster": {"dtype": dtype, "latency_p50_ms": spent, "agreement": agreement}}
                if agreement >= AGREEMENT
                else {}
            )
    how: dict[str, Any] = {
        "format": run.export.format,
        "dtype": run.export.dtype,
        "quantize": run.export.quantize,
        "code": _auto_map(draft) is not None,
    }
    how |= {
        "threads": run.evaluate.threads,
        "device": models.resolve_device(run),
        "versions": told["versions"],
    }
    return {
        "texts": len(texts),
        **answers,
        **sizes,
        "bits_per_weight": 8 * weight_bytes(draft) / told["parameters"],
        **latency,
        **how,
    }


def _median_ms(answers: list[dict[str, Any]]) -> float:
    return 1000 * statistics.median(answer["seconds"] for answer in answers)


def _loadable(
    run: config.Run, task: "Task", texts: "Dataset", tokenizer: Any, folder: Path, draft: Path
) -> dict[str, Any]:
    """What the draft answers in a fresh process that cannot import this library."""
    from distill import models
    from distill.evaluate.measure import request_texts
    from distill.export import proof
    from distill.models.loading import best_attention
    from distill.tasks.language import start_token

    plain = run.export.format == "dense" and run.export.dtype == "float32" and not _rounds(draft)
    question = {
        "folder": str(draft.resolve()),
        "auto_class": task.auto_class,
        "pipeline": task.pipeline,
        "texts": request_texts(run, task, texts),
        "start": start_token(tokenizer),
        "max_length": task.max_length,
        "threads": run.evaluate.threads,
        "device": models.resolve_device(run),
        "attention": best_attention()
        if _rounds(draft)
        else None,  # other kernels' last bits would be rounded to other levels
        "libraries": ["torchao"] if run.export.format == "torchao" else [],
        "coded": _auto_map(draft) is not None,
        "dtypes": ["bfloat16"] if plain else [],  # other ways to load it, which may be faster here
        "blocked": "distill",
    }
    try:
        return isolated.run_isolated(Path(proof.__file__), question)
    except isolated.ProcessError as error:
        raise failed(
            "loadable",
            f"plain transformers cannot use it ({error})",
            "it must load without this library",
            folder,
        ) from error


def _rounds(draft: Path) -> bool:
    """Whether inputs of layers are rounded."""
    said = json.loads((draft / "config.json").read_text())
    return bool((said.get("compression") or {}).get("activations")) or "quantization_config" in said


def _auto_map(draft: Path) -> Any:
    return json.loads((draft / "config.json").read_text()).get("auto_map")


def _equal(
    run: config.Run,
    task: "Task",
    texts: "Dataset",
    tokenizer: Any,
    folder: Path,
    student: Path,
    told: list[Any],
) -> dict[str, Any]:
    """How the draft's answers compare with those of the student in this process; and of the trained one, if it was quantized since."""
    answers = _compared(run, task, texts, tokenizer, student, told, folder)
    exact = run.export.dtype == "float32"
    needed, tolerance = (1.0, TOLERANCE * max(1.0, answers.scale)) if exact else (AGREEMENT, None)
    check_equal(answers.agreement, answers.difference, needed, tolerance, folder)
    compared = {
        "rows": answers.rows,
        "agreement": answers.agreement,
        "max_difference": answers.difference,
        "tolerance": tolerance,
        "max_logit": answers.scale,
    }
    if run.export.quantize is None:
        return compared
    trained = _compared(run, task, texts, tokenizer, folder / "student", told, folder)
    return compared | {
        "trained_agreement": trained.agreement,
        "trained_max_difference": trained.difference,
    }


def _compared(
    run: config.Run,
    task: "Task",
    texts: "Dataset",
    tokenizer: Any,
    student: Path,
    told: list[Any],
    folder: Path,
) -> Any:
    """The answers beside those of a student that is loaded here, by as many threads."""
    import torch

    from distill import models
    from distill.export import comparison

    model, threads = (
        models.load(str(student), None, task, "student", tokenizer, strict=True),
        torch.get_num_threads(),
    )
    torch.set_num_threads(run.evaluate.threads)
    try:
        with models.on_device(models.resolve_device(run), model):
            return comparison.compare(task, model, tokenizer, texts, run.data, told)
    except comparison.NotComparableError as error:
        raise failed(
            "equal", str(error), "it must answer as the trained student does", folder
        ) from error
    finally:
        torch.set_num_threads(threads)


def describe(
    run: config.Run,
    task: "Task",
    draft: Path,
    proof: dict[str, Any],
    metrics: dict[str, Any] | None,
) -> None:
    """Store the proof and the model card beside the weights."""
    (draft / "proof.json").write_text(json.dumps(proof, indent=1, allow_nan=False) + "\n")
    (draft / "README.md").write_text(card(run, task.pipeline, list(task.names), proof, metrics))


def publish(draft: Path, final: Path) -> None:
    """Give the draft its final name, when all of it is on the disk. An earlier export steps aside, and comes back if that fails."""
    store.fsync_tree(draft)
    aside = draft.with_name(f"{draft.name}-old")
    if final.exists():
        os.replace(final, aside)
    try:
        os.replace(draft, final)
    except BaseException:
        if aside.exists():
            os.replace(aside, final)
        raise
    store.fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


@cli.cli_command
def main() -> None:
    """Read the command line, export, and say where."""
    given = cli.parse_options(Options, USAGE)
    if given.packed is not None:
        _to_dense(given)
        return
    if given.run is None:
        raise UserError(
            "run is not given, but there must be something to export: add run=FOLDER, such as run=runs/NAME/TIME"
        )
    folder = evaluate.finished(given.run)
    run = compose.load_recipe(str(folder / "recipe.yaml"))
    chosen = {
        key.name: getattr(given, key.name)
        for key in fields(config.Export)
        if getattr(given, key.name) is not None
    }
    asked = run.export if given.format is None else config.Export(examples=run.export.examples)
    run = replace(run, export=replace(asked, **({"format": asked.format or "dense"} | chosen)))
    capabilities.check(
        run.callbacks, run.export.format, run.export.dtype, run.export.quantize, run.export.bits
    )
    task, texts, tokenizer = prepared(run, folder)
    artefact = export(run, task, texts, tokenizer, folder, evaluate.read(folder))
    print(f"export: {artefact}")


def _to_dense(given: Options) -> None:
    if given.run is not None or given.to is None:
        raise UserError(
            f"packed is {given.packed}, but run is {given.run} and to is {given.to}: give packed=FOLDER to=FOLDER alone"
        )
    from distill.packing.packed import to_dense

    print(f"export: {to_dense(Path(str(given.packed)), Path(given.to))}")


def prepared(run: config.Run, folder: Path) -> tuple[Any, Any, Any]:
    """Task, raw test split and tokenizer, made again from the recipe."""
    from distill import data, models
    from distill.recipe import targets

    task = targets.instantiate(run.task)
    return (
        task,
        data.load(run.data, task, run.seed)["test"],
        models.load_tokenizer(str(folder / "student")),
    )
