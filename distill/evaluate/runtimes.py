"""A student in the runtimes that could serve it, beside its teacher: bytes, agreement, quality, latency, throughput, memory.

A runtime gets the student through its own export, written for the measurement, and answers raw texts by the program that travels with
it; PyTorch is given the same tokens. Each says, alone in a process, what it answers and needs; then one process times all, in turns.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset

from distill import data, isolated, models, packing
from distill.errors import RunFailed, UserError
from distill.evaluate import cost, quality, serve, status
from distill.evaluate.measure import evenly_spaced, finite, request_texts, trimmed_tokenizer
from distill.evaluate.runtime_names import TORCH, export_of
from distill.models.loading import has_own_code
from distill.packing import runtime_folder
from distill.recipe import capabilities, config
from distill.tasks.base import Task

log = logging.getLogger("distill")

CORRECT = (
    0.97  # share of the trained student's predictions that a way must keep to be named the fastest
)
Texts = list[list[str]]  # of each text one cell, or two for pairs


def measure(
    run: config.Run,
    task: Task,
    raw: Dataset,
    tokenizer: Any,
    names: dict[str, str],
    runtimes: list[str],
    tried: bool = False,
) -> dict[str, Any]:
    """What each runtime is worth and costs on a raw split; `names` are folders of the teacher, where there is one, and of the student.

    `baseline` is what ratios are against: the teacher, or else the student, by PyTorch in float32. `tried`: a runtime that fails is left
    out, and said so; an error otherwise.
    """
    own = trimmed_tokenizer(names["student"], tokenizer) or tokenizer
    baseline = "teacher" if "teacher" in names else "student"
    with TemporaryDirectory() as temporary:
        reads = {"student": own, "teacher": tokenizer}
        forms = {
            who: _torch(task, reads[who], names[who], Path(temporary, f"{who}.json"))
            for who in reads
            if who in names
        }
        texts = request_texts(run, task, raw)
        answers = {who: _alone(run, task, texts, form) for who, form in forms.items()}
        log.info("measuring %s", ", ".join(runtimes))
        for name in runtimes:
            with left_out(name) if tried else nullcontext():
                form = (
                    _as(name, forms["student"])
                    if name in TORCH
                    else _export(run, task, own, names, name, Path(temporary))
                )
                answers[name] = (
                    answers["student"]
                    if form == forms["student"]
                    else _alone(run, task, texts, form)
                )
                forms[name] = form
        runtimes = [name for name in runtimes if name in forms]
        clocked = {name: form for name, form in forms.items() if name in (baseline, *runtimes)}
        timed = _timed(run, [_read(task, own, cells) for cells in texts], clocked)
    found = {
        name: {
            "bytes": forms[name]["bytes"],
            **_worth(run, task, raw, own, answers[name]["said"], answers["student"]["said"]),
        }
        | {"cost": costs | answers[name]["costs"]}
        for name, costs in timed["costs"].items()
    }
    said = {
        "examples": len(raw),
        "baseline": baseline,
        "metric": task.primary,
        "runtimes": found,
        "fastest": fastest(found, runtimes),
    }
    return finite(said | {"machine": timed["machine"]})


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """A runtime that cannot hold or run the student is one less, with a word about it."""
    try:
        yield
    except (UserError, RunFailed) as error:
        log.warning("%s is left out: %s", name, error)


def fastest(found: dict[str, Any], runtimes: list[str]) -> dict[str, str]:
    """Of those that are correct, the one with the lowest latency and the one with the highest throughput."""
    costs = {
        name: found[name]["cost"]
        for name in runtimes
        if found[name]["agreement"]["value"] >= CORRECT
    }
    if not costs:
        return {}
    soonest = min(costs, key=lambda name: costs[name]["latency_p50_ms"])
    return {
        "latency": soonest,
        "throughput": max(costs, key=lambda name: costs[name]["examples_per_s"]),
    }


def _torch(task: Task, tokenizer: Any, name: str, file: Path) -> dict[str, Any]:
    """A model as transformers loads it, and the tokenizer that a runtime's program would have."""
    folder = models.local_files(name, "model")
    runtime_folder.check_fast(tokenizer, "runtimes is given")
    runtime_folder.runtime_tokenizer(task, tokenizer).save(str(file))
    options = {"auto_class": task.auto_class, "coded": has_own_code(folder), "tokenizer": str(file)}
    return {
        "form": "torch",
        "folder": str(folder.resolve()),
        "program": None,
        "bytes": cost.weight_bytes(folder),
    } | options


def _as(form: str, student: dict[str, Any]) -> dict[str, Any]:
    """The same folder in another form; bfloat16 has half the bytes of float32. Where int8 is made of it, it is not stored so."""
    return student | {
        "form": form,
        "bytes": student["bytes"] // (2 if form.endswith("bf16") else 1),
    }


def _export(
    run: config.Run, task: Task, tokenizer: Any, names: dict[str, str], name: str, temporary: Path
) -> dict[str, Any]:
    """The folder that ships, without its proof: what it answers is measured here."""
    wanted, folder = export_of(name), temporary / name
    folder.mkdir()
    log.info("writing the student for %s", name)
    with status(run, f"writing the student for {name}"):
        packing.write_artefact(
            replace(run, export=wanted), task, tokenizer, Path(names["student"]), folder
        )
    size = cost.disk_bytes(folder, capabilities.RUNTIMES[str(wanted.format)].files)
    return {
        "form": name,
        "folder": str(folder),
        "program": runtime_folder.runtime_program(str(wanted.format), task.pipeline),
        "bytes": size,
    }


def _read(task: Task, tokenizer: Any, cells: list[str]) -> list[str]:
    """What the model reads of a text: what is cut off would be a cost of tokenising alone."""
    if task.pipeline != "text-classification":
        return cells
    tokens = tokenizer(
        *cells, truncation=True, max_length=task.max_length, return_offsets_mapping=True
    )
    places = list(zip(tokens["offset_mapping"], tokens.sequence_ids(), strict=True))
    ends = [
        max((end for (_, end), owner in places if owner == cell), default=0)
        for cell in range(len(cells))
    ]
    return [text[:end] for text, end in zip(cells, ends, strict=True)]


def _alone(run: config.Run, task: Task, texts: Texts, form: dict[str, Any]) -> dict[str, Any]:
    """What one of them says to all texts, always in the same batches, and the memory of its process."""
    size, every = run.evaluate.batch_size, task.pipeline == "text-classification"
    batches = [texts[first : first + size] for first in range(0, len(texts), size)]
    return _asked(
        run, {form["form"]: form}, {"measure": "alone", "batches": batches, "every": every}
    )


def _timed(run: config.Run, texts: Texts, forms: dict[str, Any]) -> dict[str, Any]:
    """Single requests spread over the texts, and full batches of texts that are about as long."""
    size, settings = min(run.evaluate.batch_size, len(texts)), run.evaluate
    requests = [[texts[place]] for place in evenly_spaced(len(texts), settings.requests)]
    chosen = sorted(
        (texts[place] for place in evenly_spaced(len(texts), size * settings.batches)),
        key=lambda cells: sum(map(len, cells)),
    )
    batches = [chosen[first : first + size] for first in range(0, len(chosen) - size + 1, size)]
    machine = {"dtype": cost.DTYPE, "attention": "eager", "device": "cpu"}
    with status(run, "timing the runtimes"):
        return _asked(
            run, forms, {"measure": "speed", "requests": requests, "batches": batches} | machine
        )


def _asked(run: config.Run, forms: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
    try:
        return isolated.run_isolated(
            Path(serve.__file__), {"served": forms, "threads": run.evaluate.threads} | question
        )
    except isolated.ProcessError as error:
        measured = ", ".join(forms)
        raise RunFailed(
            f"the measurement of {measured} ended early ({error}), but each must answer: leave it out of runtimes="
        ) from error


def _worth(
    run: config.Run, task: Task, raw: Dataset, tokenizer: Any, said: list[Any], student: list[Any]
) -> dict[str, Any]:
    """The share of predictions that are the trained student's, and the task's metrics; of a language model's next tokens the first."""
    rows, reference = torch.tensor(said), torch.tensor(student)
    if task.pipeline == "text-generation":
        return _agreed(rows == reference) | {"quality": {}}
    batch = task.collate(
        data.columns_to_examples(task.encode(raw[:], tokenizer, run.data)), tokenizer.pad_token_id
    )
    drawn = quality.bootstrap(task, task.outcomes(rows, batch), run.evaluate.bootstrap, run.seed)
    measured = {metric: each._asdict() for metric, each in drawn.intervals().items()}
    return _agreed(task.agreement(rows, reference)) | {"quality": measured}


def _agreed(agreed_B: torch.Tensor) -> dict[str, Any]:
    share = float(agreed_B.double().mean())
    low, high = quality.share_interval(share, len(agreed_B))
    return {"agreement": {"value": share, "low": low, "high": high}}
