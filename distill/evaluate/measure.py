"""teacher, student and a split -> what they are worth and what they cost: the nested dictionary of metrics.json.

All answer the same examples once, and `dense`, a compressed student as it was before, with them. From their outcomes come quality
with 95 % intervals, a paired comparison, and how closely the student follows its teacher; cost is measured in processes of its
own (cost.py).
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import AutoConfig

from distill import data, isolated, models, packing
from distill.compress import tokenizer_trim
from distill.errors import RunFailed, UserError
from distill.evaluate import cost, quality, status
from distill.models.loading import (
    has_own_code,
    resolve_path,
    silence_transformers,
    translate_errors,
    write_auto_map,
)
from distill.recipe import capabilities, config
from distill.remote_code import container
from distill.tasks.base import Batch, Task

log = logging.getLogger("distill")

Columns = dict[str, Tensor]  # outcomes of all examples, each (examples, ...)


class ModelInputs(NamedTuple):
    """What a model reads: the split as a tokenizer encodes it."""

    tokenizer: Any
    examples: Dataset


def measure(
    run: config.Run,
    task: Task,
    raw: Dataset,
    examples: Dataset,
    tokenizer: Any,
    names: dict[str, str],
    split: str,
    as_exported: bool = False,
) -> dict[str, Any]:
    """Quality, comparison, fidelity and cost of models by their folders or names; null where a number cannot be known.

    `names` are of `teacher`, `dense` and `student`, in this order; only the last must be there. `as_exported`: the student is
    measured in the form that the recipe's `export` section gives it; as it was trained, where that is for a runtime (runtimes.py).
    """
    if run.export.format in capabilities.RUNTIMES:
        run = replace(run, export=config.Export())
    read = inputs_by_model(run, task, raw, ModelInputs(tokenizer, examples), names, split)
    with TemporaryDirectory() as temporary:
        if as_exported:
            names = names | {
                "student": str(
                    _exported(
                        run,
                        task,
                        read["student"].tokenizer,
                        Path(names["student"]),
                        Path(temporary),
                    )
                )
            }
        loaded = {
            what: models.load_trained(name, task, what, read[what].tokenizer)
            for what, name in names.items()
        }
        folders = {
            what: _folder(names[what], model, Path(temporary, what))
            for what, model in loaded.items()
        }
        log.info("measuring %s on %d examples: quality", _listed(names), len(examples))
        with status(run, "measuring quality"):
            metrics = _answered(run, task, ModelInputs(tokenizer, examples), read, loaded)
        del loaded  # the processes that measure cost need the memory
        log.info("measuring %s: cost", _listed(names))
        with status(run, "measuring cost"):
            costs, machine = _costs(run, task, read, folders, models.resolve_device(run))
    measured = {what: {"quality": metrics.pop(what), "cost": costs[what]} for what in names}
    said = {"split": split, "examples": len(examples), "texts": metrics.pop("texts")}
    form = {"form": asdict(run.export)} if as_exported else {}
    return finite(said | measured | metrics | form | {"machine": machine})


def _answered(
    run: config.Run,
    task: Task,
    shared: ModelInputs,
    read: dict[str, ModelInputs],
    loaded: dict[str, Any],
) -> dict[str, Any]:
    """What the models' answers are worth, and how closely they follow the teacher's."""
    batches = data.make_loader(
        shared.examples, task, shared.tokenizer.pad_token_id, run.evaluate.batch_size
    )
    own = {
        what: _batches(task, each, batches.plan)
        for what, each in read.items()
        if each.examples is not shared.examples
    }
    with models.on_device(models.resolve_device(run), *loaded.values()):
        columns, followed = outcomes(task, loaded, batches, own)
    columns = {what: by_text(each, shared.examples, batches.plan) for what, each in columns.items()}
    worth = _worth(run, task, columns)
    if "teacher" in loaded:
        worth["fidelity"] = followed.pop("student") | followed | {"name": task.divergences[0]}
    return worth | {"texts": len(next(iter(columns["student"].values())))}


def _listed(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def inputs_by_model(
    run: config.Run,
    task: Task,
    raw: Dataset,
    shared: ModelInputs,
    names: dict[str, str],
    split: str,
) -> dict[str, ModelInputs]:
    """What each model reads: all the same, but for a student whose vocabulary was trimmed, which has ids of its own."""
    found = dict.fromkeys(names, shared)
    own = trimmed_tokenizer(names["student"], shared.tokenizer)
    if own is not None:
        found["student"] = ModelInputs(
            own, data.encode(DatasetDict({split: raw}), task, own, run.data)[split]
        )
    return found


def trimmed_tokenizer(name: str, whole: Any) -> Any:
    """The student's tokenizer where it is this one without some of its tokens, and its config says so; null otherwise."""
    where = resolve_path(name, "student")
    with translate_errors(name, "student", Path(where).is_dir()):
        settings = AutoConfig.from_pretrained(where, trust_remote_code=False).to_dict()
    if "vocabulary" not in (settings.get("compression") or {}):
        return None
    own = models.load_tokenizer(name, "student")
    has_own_code, theirs = own.get_vocab(), whole.get_vocab()
    return (
        own
        if has_own_code != theirs and tokenizer_trim.is_trimmed_vocabulary(has_own_code, theirs)
        else None
    )


def _exported(run: config.Run, task: Task, tokenizer: Any, student: Path, temporary: Path) -> Path:
    """The student as it ships; where that is as it was trained, its own folder."""
    wanted = run.export
    if wanted.format in (None, "dense") and wanted.dtype == "float32" and wanted.quantize is None:
        return student
    target = temporary / "exported"
    target.mkdir()
    try:
        packing.write_artefact(run, task, tokenizer, student, target)
    except (
        UserError,
        RunFailed,
    ) as error:  # the export will say so too; what was trained is worth measuring all the same
        log.warning(
            "the student is measured as it was trained, for it cannot be exported: %s", error
        )
        return student
    return target


def _batches(task: Task, read: ModelInputs, plan: data.BatchPlan) -> Iterator[Batch]:
    """The examples of a plan, as another tokenizer encodes them."""
    encoded = data.EncodedDataset(read.examples, task, read.tokenizer.pad_token_id)
    return (encoded[micro] for micro in plan)


def _folder(name: str, model: Any, target: Path) -> Path:
    """Where the model's files are; one that came by name is stored, so that all are weighed in the same form."""
    local = Path(name).expanduser()
    if local.is_dir() and (
        "auto_map" not in (local / "config.json").read_text() or has_own_code(local)
    ):
        return local
    with silence_transformers():
        model.save_pretrained(target)
    write_auto_map(model, target, container.needs_code(model.config))
    return target


def _worth(run: config.Run, task: Task, columns: dict[str, Columns]) -> dict[str, Any]:
    """Quality with intervals and, where there is a teacher, the paired comparison on the task's primary metric."""
    resamples = run.evaluate.bootstrap
    drawn = {
        what: quality.bootstrap(task, column, resamples, run.seed)
        for what, column in columns.items()
    }
    worth: dict[str, Any] = {
        what: {metric: each._asdict() for metric, each in one.intervals().items()}
        for what, one in drawn.items()
    }
    if "teacher" in drawn:
        worth["comparison"] = {
            "metric": task.primary,
            "maximise": task.maximise,
            "difference": quality.difference(
                drawn["student"], drawn["teacher"], task.primary
            )._asdict(),
            "p": quality.randomisation(
                task, columns["student"], columns["teacher"], resamples, run.seed
            ),
        }
    return worth | {"resamples": resamples}


def _costs(
    run: config.Run, task: Task, read: dict[str, ModelInputs], folders: dict[str, Path], device: str
) -> Any:
    """Requests are the first model's own encodings; those of a student with a vocabulary of its own are given beside them."""
    shared, *_ = read.values()
    singles, groups = requests(task, shared.examples, shared.tokenizer.pad_token_id, run.evaluate)
    own = {
        what: requests(task, each.examples, each.tokenizer.pad_token_id, run.evaluate)
        for what, each in read.items()
        if each.examples is not shared.examples
    }
    options: dict[str, Any] = {"own": own} if own else {}
    try:
        return cost.measure(
            folders, task.auto_class, singles, groups, run.evaluate.threads, device, **options
        )
    except isolated.ProcessError as error:
        raise RunFailed(
            f"the measurement of cost ended early ({error}), but it must be known: the models are kept, run distill.evaluate"
        ) from error


def outcomes(
    task: Task,
    loaded: dict[str, Any],
    batches: Iterable[Batch],
    own: Mapping[str, Iterable[Batch]] | None = None,
) -> tuple[dict[str, Columns], dict[str, Any]]:
    """One pass over the batches: what quality needs of every example, for each model, and each one's fidelity to the teacher.

    `own` are the batches, of the same examples, of models that read other ids.
    """
    own = own or {}
    parts: dict[str, list[Columns]] = {what: [] for what in loaded}
    followed: dict[str, list[tuple[Tensor, Tensor]]] = {
        what: [] for what in loaded if what != "teacher"
    }
    device = loaded["student"].device
    with torch.inference_mode():
        for batch, *others in zip(batches, *own.values(), strict=True):
            given = dict.fromkeys(loaded, move_data_to_device(batch, device))
            given |= {
                what: move_data_to_device(other, device)
                for what, other in zip(own, others, strict=True)
            }
            rows = {
                what: task.rows(models.logits(model, given[what].inputs), given[what]).float()
                for what, model in loaded.items()
            }
            for what, rows_NC in rows.items():
                parts[what].append(
                    {
                        key: column.cpu()
                        for key, column in task.outcomes(rows_NC, given[what]).items()
                    }
                )
            for what in followed if "teacher" in rows else ():
                pair = _same_classes(rows[what], rows["teacher"])
                followed[what].append((task.agreement(*pair).cpu(), task.divergence(*pair).cpu()))
    columns = {
        what: {key: torch.cat([part[key] for part in some]) for key in some[0]}
        for what, some in parts.items()
    }
    return columns, {what: _means(pairs) for what, pairs in followed.items() if pairs}


def _means(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    means = (float(torch.cat(values).double().mean()) for values in zip(*pairs, strict=True))
    return dict(zip(("agreement", "divergence"), means, strict=True))


def by_text(columns: Columns, examples: Dataset, plan: data.BatchPlan) -> Columns:
    """Outcomes, in the plan's order, summed over the windows of each text where texts were cut into some.

    Windows of one text are alike, so that intervals from windows would be too narrow: what is resampled are texts.
    """
    if "begins" not in examples.column_names:
        return columns
    text_of = np.cumsum(examples.with_format("numpy")["begins"][:]) - 1
    index = torch.from_numpy(text_of[[place for micro in plan for place in micro.indices]])
    return {
        name: torch.zeros(int(text_of[-1]) + 1).double().index_add(0, index, column.double())
        for name, column in columns.items()
    }


def _same_classes(student_NC: Tensor, teacher_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the classes that only a wider vocabulary has: no token of the tokenizer's."""
    shared = min(student_NC.shape[1], teacher_NC.shape[1])
    return student_NC[:, :shared], teacher_NC[:, :shared]


def requests(
    task: Task, examples: Dataset, pad_id: int, settings: config.Evaluate
) -> tuple[list[Any], list[Any]]:
    """Inputs of the timed single requests and of the timed batches: real examples, spread evenly over the split."""
    singles = [[place] for place in evenly_spaced(len(examples), settings.requests)]
    size = settings.batch_size
    chosen = sorted(
        evenly_spaced(len(examples), size * settings.batches), key=examples["length"].__getitem__
    )
    groups = [
        chosen[first : first + size] for first in range(0, max(len(chosen) - size, 0) + 1, size)
    ]  # full ones, like with like

    def inputs(places: list[int]) -> dict[str, list[list[int]]]:
        batch = task.collate([examples[place] for place in places], pad_id)
        return {name: tensor.tolist() for name, tensor in batch.inputs.items()}

    return [inputs(places) for places in singles], [inputs(places) for places in groups]


def request_texts(run: config.Run, task: Task, raw: Dataset) -> list[list[str]]:
    """The cells of every text, two for pairs; a language model continues the first column."""
    columns = run.data.text if task.pipeline == "text-classification" else run.data.text[:1]
    return [
        [cell or "" for cell in row]
        for row in zip(*(raw[column] for column in columns), strict=True)
    ]


def evenly_spaced(size: int, count: int) -> list[int]:
    """`count` places, at most all, spread evenly over `size`."""
    count = min(count, size)
    return [place * size // count for place in range(count)]


def finite(value: Any) -> Any:
    """The same structure with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
