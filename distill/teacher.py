"""The teacher: fine-tuned once where the recipe asks for it, then frozen; and its outputs, computed once and kept beside the examples."""

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from distill import data, models, store, teacher_outputs
from distill.compress.restore import strip_quantization
from distill.errors import UserError
from distill.module import Distillation
from distill.processes import fsdp, ranks
from distill.recipe import config
from distill.stages import show_progress
from distill.tasks.base import Task
from distill.teacher_outputs import TeacherOutputs
from distill.training import loop, performance
from distill.training.loggers import Tracker

log = logging.getLogger(__name__)

VERSION = 3  # of what is stored here: raise it when training or losses change, and no older teacher or output is used
CHUNK = 1 << 26  # bytes of outputs that are in memory at a time
TOGETHER = 2048  # examples that are sorted by length and computed together, at the most: ranks take turns at so many
OUTPUTS = "outputs.arrow"
FLOAT = 4  # bytes of one of them


def obtain(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    examples: DatasetDict,
    folder: Path,
    tracker: Tracker,
) -> PreTrainedModel | None:
    """The frozen teacher: as it is, fine-tuned on the labelled examples, or reused from an earlier run with the same ingredients."""
    if run.teacher is None:
        return None
    teacher_outputs.check_outputs(run, task)
    L.seed_everything(run.seed, verbose=False)
    as_it_is = run.teacher.finetune is None and run.teacher.model is not None
    with ranks.rank_zero_first():  # it may have to be downloaded
        teacher = models.load(
            run.teacher.model, run.teacher.config, task, "teacher", tokenizer, strict=as_it_is
        )
    models.check_length(teacher, task.max_length, "teacher")
    models.check_floats(teacher, "teacher")
    if run.teacher.finetune is not None:
        strip_quantization(teacher, "teacher")
        models.set_labels(teacher, task)
        teacher = finetuned(run, task, tokenizer, examples, teacher, folder, tracker)
    else:
        models.check_labels(teacher, task, "teacher")
        if run.teacher.model is None and ranks.is_rank_zero():
            models.save(teacher, tokenizer, folder / "teacher")
    return teacher.eval().requires_grad_(False)


def answering(run: config.Run, teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher in the dtype in which it answers; a copy where the student is yet to be cut from its layers."""
    dtype = getattr(torch, models.resolve_teacher_dtype(run))
    whole = (
        copy.deepcopy(teacher)
        if run.student.layers is not None and dtype != teacher.dtype
        else teacher
    )
    return whole.to(dtype)


def finetuned(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    examples: DatasetDict,
    teacher: PreTrainedModel,
    folder: Path,
    tracker: Tracker,
) -> PreTrainedModel:
    """The fine-tuned teacher, from the store or trained now and put there; its files are in the run folder too."""
    labelled = DatasetDict(
        train=data.only_labelled(examples["train"], task), validation=examples["validation"]
    )
    entry = store.entry_path("teachers", _ingredients(run, task, labelled, teacher))
    checkpoints = folder / "checkpoints" / "teacher"
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the fine-tuned teacher of an earlier run with the same ingredients is used again")
    else:
        _finetune(run, task, tokenizer, labelled, teacher, checkpoints, tracker)
        if ranks.is_rank_zero():
            with store.write_entry(entry) as inside:
                models.save(teacher, tokenizer, inside)
    if ranks.is_rank_zero():
        store.link_tree(entry, folder / "teacher")
        shutil.rmtree(
            checkpoints, ignore_errors=True
        )  # the store and the run folder hold the result
    ranks.barrier()
    return models.load(str(entry), None, task, "teacher", tokenizer, strict=True)


def _ingredients(
    run: config.Run, task: Task, labelled: DatasetDict, teacher: PreTrainedModel
) -> dict[str, Any]:
    """All that decides the weights of a fine-tuned teacher."""
    assert run.teacher is not None and run.teacher.finetune is not None
    settings, finetune = run.trainer, run.teacher.finetune
    return {
        "weights": models.fingerprint(teacher),
        "made by": _made_by(task),
        "examples": [data.fingerprint(labelled["train"]), data.fingerprint(labelled["validation"])],
        "epochs": finetune.epochs,
        "optimizer": asdict(replace(run.optimizer, lr=finetune.lr)),
        "trainer": [
            loop.resolve_precision(settings),
            settings.accelerator,
            settings.accumulate,
            settings.validations,
            settings.patience,
        ],
        "batches": [run.data.batch_size, run.data.group_by_length],
        "seed": run.seed,
    }


def _made_by(task: Task) -> list[Any]:
    """What decides a result beside weights and data."""
    return [VERSION, *task.identity()]


def _finetune(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    labelled: DatasetDict,
    teacher: PreTrainedModel,
    folder: Path,
    tracker: Tracker,
) -> None:
    """Train on the labels alone, in the run's own way but for length and rate."""
    assert run.teacher is not None and run.teacher.finetune is not None
    settings = run.teacher.finetune
    train, validation = loop.make_loaders(
        run, labelled["train"], labelled["validation"], task, tokenizer.pad_token_id
    )
    steps = loop.count_steps(run.trainer, train.plan.steps, settings.epochs)
    module = Distillation(
        task, teacher, None, config.Loss(alpha=1.0), replace(run.optimizer, lr=settings.lr), steps
    )
    log.info(
        "fine-tuning the teacher on %d examples, %d steps, %s",
        len(labelled["train"]),
        steps,
        loop.resolve_precision(run.trainer),
    )
    loop.fit(
        module,
        train,
        validation,
        replace(run.trainer, compile=False),
        folder,
        tracker.loggers("teacher"),
        [],
        "teacher.finetune.lr",
    )


def with_outputs(
    run: config.Run, teacher: PreTrainedModel | None, examples: Dataset, task: Task, tokenizer: Any
) -> Dataset:
    """The examples with columns of the teacher's outputs; as they are where the teacher answers online, or not at all."""
    if (
        run.teacher is None
        or teacher is None
        or run.teacher.outputs == "online"
        or not run.loss.needs_teacher
    ):
        return examples
    kept = teacher_outputs.build_outputs(
        run, answering(run, teacher), task, models.vocabulary_size(tokenizer)
    )
    ingredients = {
        "weights": models.fingerprint(kept.teacher),  # its dtype is part of it
        "inputs": data.fingerprint(
            examples
        ),  # tokenizer, encoding arguments and data are part of it
        "made by": _made_by(task),
        "device": models.resolve_device(run),
    } | ({"outputs": kept.identity} if kept.identity else {})
    entry = store.entry_path("outputs", ingredients)
    if ranks.run_on_rank_zero(lambda: store.is_intact(entry)):
        log.info("the teacher's outputs of an earlier run with the same ingredients are used again")
    else:
        _refuse_too_large(kept, run.teacher.outputs, examples)
        log.info(
            "the teacher answers %d examples once, in %s",
            len(examples),
            models.resolve_teacher_dtype(run),
        )
        _fill(run, kept, examples, tokenizer.pad_token_id, entry)
    outputs = Dataset.from_file(str(entry / OUTPUTS))
    return concatenate_datasets([examples, outputs], axis=1)


def _fill(
    run: config.Run, kept: TeacherOutputs, examples: Dataset, pad_id: int, entry: Path
) -> None:
    """Each rank computes every world-th chunk; the first one joins them. The bytes do not depend on how many there are."""
    if ranks.world_size() == 1:
        with store.write_entry(entry) as inside:
            _write(run, kept, examples, pad_id, inside / OUTPUTS)
        return
    with (
        store.temporary_folder(entry.parent)
        if ranks.is_rank_zero()
        else nullcontext(Path()) as drafts
    ):
        parts = ranks.broadcast(drafts)
        _write(run, kept, examples, pad_id, parts / f"{ranks.rank()}.arrow")
        ranks.barrier()
        if ranks.is_rank_zero():
            with store.write_entry(entry) as inside:
                _join(
                    [parts / f"{rank}.arrow" for rank in range(ranks.world_size())],
                    inside / OUTPUTS,
                )
    ranks.barrier()


def _join(parts: list[Path], file: Path) -> None:
    """The chunks of all ranks in the order of the examples: the n-th is the next one of rank n % world."""
    with ExitStack() as opened:
        streams = [
            pa.ipc.open_stream(opened.enter_context(pa.memory_map(str(part)))) for part in parts
        ]
        joined = opened.enter_context(pa.ipc.new_stream(str(file), streams[0].schema))
        for turn in zip_longest(*streams):
            for chunk in (chunk for chunk in turn if chunk is not None):
                joined.write_batch(chunk)


def _refuse_too_large(kept: TeacherOutputs, name: str, examples: Dataset) -> None:
    size, free = (
        kept.size * int(np.sum(examples.with_format("numpy")["rows"][:])),
        shutil.disk_usage(store.cache_root()).free,
    )
    if size > free / 2:
        raise UserError(
            f"teacher.outputs is {name}, but these outputs take {size / 1e9:.1f} GB and must leave half of the "
            f"{free / 1e9:.1f} GB that are free at {store.cache_root()}: set teacher.outputs=online, or DISTILL_CACHE to a larger disk"
        )


def _write(
    run: config.Run, kept: TeacherOutputs, examples: Dataset, pad_id: int, file: Path
) -> None:
    """One forward over this rank's chunks, one by one; inside a chunk the longest go first, so that batches pad little."""
    chunks = _chunks(examples, -(-kept.width * np.dtype(kept.dtype).itemsize // FLOAT))[
        ranks.rank() :: ranks.world_size()
    ]
    schema = kept.schema()
    behind = _behind(chunks, run.evaluate.batch_size) if fsdp.uses_fsdp(run.trainer) else 0
    with (
        _answering(run, kept),
        performance.keep_freed_memory(),
        Progress(
            console=Console(), transient=True, disable=not show_progress(run.trainer.progress)
        ) as bar,
        pa.ipc.new_stream(str(file), schema) as stream,
    ):
        shown = bar.add_task("teacher outputs", total=sum(map(len, chunks)))
        for places in chunks:
            loader = data.make_loader(
                examples.select(places), kept.task, pad_id, run.evaluate.batch_size
            )
            outputs = _outputs(kept, loader, places, lambda count: bar.advance(shown, count))
            stream.write_batch(pa.record_batch(outputs, schema=schema))
        for _ in range(behind):
            _outputs(
                kept,
                data.make_loader(examples.select([0]), kept.task, pad_id, 1),
                range(1),
                lambda _: None,
            )


def _behind(chunks: list[range], batch_size: int) -> int:
    """Forwards that another rank needs and this one does not: a split teacher answers only while all ranks ask."""
    forwards = ranks.all_gather(sum(-(-len(places) // batch_size) for places in chunks))
    return max(forwards) - forwards[ranks.rank()]


@contextmanager
def _answering(run: config.Run, kept: TeacherOutputs) -> Iterator[None]:
    """The teacher is where it computes: whole on each rank's device, or split over all of them."""
    device, whole = models.resolve_device(run), kept.teacher
    if not fsdp.uses_fsdp(run.trainer):
        with models.on_device(device, whole):
            yield
        return
    kept.teacher = fsdp.shard(whole, fsdp.device_mesh(device))
    yield
    kept.teacher = whole


def _chunks(examples: Dataset, width: int) -> list[range]:
    """Neighbouring examples, TOGETHER of them or those whose outputs take about CHUNK bytes, one at the least."""
    rows = np.asarray(examples.with_format("numpy")["rows"][:], dtype=np.int64)
    by_size = (rows.cumsum() - rows) * width * FLOAT // CHUNK
    ends = np.flatnonzero(np.diff(by_size)) + 1
    edges = [0, *ends.tolist(), len(rows)]
    return [
        range(start, min(start + TOGETHER, end))
        for first, end in pairwise(edges)
        for start in range(first, end, TOGETHER)
    ]


@torch.inference_mode()
def _outputs(
    kept: TeacherOutputs, loader: data.Loader, numbers: range, seen: Callable[[int], None]
) -> dict[str, pa.Array]:
    """What is kept of the loader's examples, which have these numbers in the split: in their order, in numpy's own buffers."""
    parts, places = [], []
    for micro, batch in zip(loader.plan, loader, strict=True):
        batch = move_data_to_device(batch, kept.teacher.device)
        examples = np.asarray(micro.indices)
        parts.append(kept.rows(batch, numbers.start + examples).cpu().numpy())
        places.append(examples[batch.example.cpu().numpy()])
        seen(len(micro.indices))
    example_N = np.concatenate(places)
    values_NW = np.concatenate(parts)[np.argsort(example_N, kind="stable")]
    return kept.columns(
        values_NW, np.bincount(example_N, minlength=len(loader.plan.lengths)).cumsum()
    )
