"""The proof of a runtime's export: its program, in a fresh process, answers as the student does that was trained.

Both answer the same batches, for where a runtime rounds to a range of the whole batch, an answer depends on what else is in it.
B = texts, C = classes or vocabulary.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from distill import isolated, models
from distill.data import columns_to_examples
from distill.evaluate import quality
from distill.evaluate.cost import disk_bytes
from distill.evaluate.measure import finite, request_texts
from distill.export import comparison, program
from distill.export.checks import check_equal, failed, smaller
from distill.packing import runtime_folder
from distill.recipe import capabilities, config
from distill.remote_code.modeling import compression_of
from distill.tasks.base import Batch, Task
from distill.tasks.language import start_token

TOLERANCE = (
    1e-5  # largest difference of logits, relative to the largest logit, of an export in float32
)
AGREEMENT = 0.99  # share of predictions that an export in bfloat16 keeps
AGREEMENT_INT8 = 0.97  # and one in int8
CONTINUED, MOST = 4, 8  # texts that a language model continues, by that many tokens


class UnusableError(Exception):
    """The program does not run; the message says why."""


class Student(NamedTuple):
    """What the proof wants to know of it."""

    parameters: int
    rounds: bool  # inputs of layers: the last bit of a sum, which depends on its order, then decides between two levels


class Given(NamedTuple):
    """What is asked: raw texts in batches of one size, and what the student reads of them."""

    cells: list[list[str]]  # of each text
    size: int
    batches: list[Batch]

    def batched(self) -> list[list[list[str]]]:
        """The texts of each batch."""
        return [
            self.cells[first : first + self.size] for first in range(0, len(self.cells), self.size)
        ]

    def shortest(self) -> list[tuple[str, list[int]]]:
        """The first texts to be continued, with their tokens: there is the most room behind short ones."""
        texts = [text for (text,) in self.cells]
        read = (batch.inputs for batch in self.batches)
        tokens = [
            ids[mask.bool()].tolist()
            for each in read
            for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True)
        ]
        return sorted(zip(texts, tokens, strict=True), key=lambda one: len(one[1]))[:CONTINUED]


def prove(
    run: config.Run, task: Task, texts: Dataset, tokenizer: Any, folder: Path, draft: Path
) -> dict[str, Any]:
    """Loadable, equal to the student that was trained, smaller, in this order: what proof.json holds, or RunFailed."""
    runtime, quantize = (
        capabilities.RUNTIMES[str(run.export.format)],
        capabilities.resolve_quantize(str(run.export.format), run.export.quantize),
    )
    asked = given(run, task, texts, tokenizer)
    try:
        told = answered(run, task, asked, draft)
    except UnusableError as error:
        raise failed(
            "loadable", str(error), "its program must run on its runtime alone", folder
        ) from error
    found, model = compared(run, task, tokenizer, folder / "student", asked, told)
    needed, tolerance, way_out = law(run, found["max_logit"], model.rounds)
    check_equal(found["agreement"], found["max_difference"], needed, tolerance, folder, way_out)
    if found.get("generated"):
        check_generated(found["generated"], needed, folder, way_out)
    sizes = smaller(run, folder, draft, runtime.files)
    how = {
        "format": run.export.format,
        "dtype": run.export.dtype,
        "quantize": quantize,
        "batch": asked.size,
        "tolerance": tolerance,
    }
    how |= {
        "threads": run.evaluate.threads,
        "device": "cpu",
        "versions": told["versions"],
        "code": False,
    }
    how |= {"cached": json.loads((draft / "config.json").read_text())["cached"]}
    bits = {"bits_per_weight": 8 * disk_bytes(draft, runtime.files) / model.parameters}
    return {
        "texts": len(texts),
        **found,
        **sizes,
        **bits,
        "latency_p50_ms": 1000 * statistics.median(told["seconds"]),
        **how,
    }


def given(run: config.Run, task: Task, texts: Dataset, tokenizer: Any) -> Given:
    size = run.evaluate.batch_size
    parts = (
        texts.select(range(first, min(first + size, len(texts))))
        for first in range(0, len(texts), size)
    )
    read = _last if task.pipeline == "text-generation" else _examples
    batches = [
        task.collate(read(task, part, tokenizer, run.data), tokenizer.pad_token_id)
        for part in parts
    ]
    return Given(request_texts(run, task, texts), size, batches)


def _examples(
    task: Task, texts: Dataset, tokenizer: Any, data: config.Data
) -> list[dict[str, Any]]:
    return columns_to_examples(task.encode(texts[:], tokenizer, data))


def _last(task: Task, texts: Dataset, tokenizer: Any, data: config.Data) -> list[dict[str, Any]]:
    """A language model continues a text, of which it reads as much of the end as fits."""
    start, found = start_token(tokenizer), []
    for text in texts[data.text[0]]:
        ids = tokenizer(text or "", add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*start, *ids[max(0, len(ids) + len(start) - task.max_length) :]]
        found.append({"input_ids": ids, "labels": [-100] * len(ids), "size": 0})
    return found


def answered(run: config.Run, task: Task, asked: Given, draft: Path) -> dict[str, Any]:
    """What the program says in its own process."""
    format = str(run.export.format)
    runtime = capabilities.RUNTIMES[format]
    continues = task.pipeline == "text-generation"
    question = {
        "folder": str(draft.resolve()),
        "program": runtime_folder.runtime_program(format, task.pipeline),
        "batches": asked.batched(),
        "every": not continues,
        "continued": [text for text, _ in asked.shortest()] if continues else [],
        "most": MOST,
        "threads": run.evaluate.threads,
        "libraries": runtime.libraries,
        "blocked": list(runtime.blocked),
    }
    try:
        return isolated.run_isolated(Path(program.__file__), question)
    except isolated.ProcessError as error:
        raise UnusableError(f"{runtime.name} cannot use it ({error})") from error


@torch.inference_mode()
def student_rows(task: Task, model: Any, batches: list[Batch]) -> Iterator[Tensor]:
    """The student's logits of each batch, (B, C), those of a text's last token for language models."""
    for batch in batches:
        logits = models.logits(model, batch.inputs).float()
        if logits.dim() == 3:
            logits = logits[torch.arange(len(logits)), batch.inputs["attention_mask"].sum(1) - 1]
        yield logits


def compared(
    run: config.Run,
    task: Task,
    tokenizer: Any,
    student: Path,
    asked: Given,
    program: dict[str, Any],
) -> tuple[dict[str, Any], Student]:
    """Agreement and quality, both with 95 % intervals; for language models agreement alone, on the token that follows and those after."""
    model, threads = (
        models.load(str(student), None, task, "student", tokenizer, strict=True),
        torch.get_num_threads(),
    )
    told = program["answers"]
    torch.set_num_threads(run.evaluate.threads)
    try:
        student_BC = torch.cat(list(student_rows(task, model, asked.batches)))
    finally:
        torch.set_num_threads(threads)
    scale, record = float(student_BC.abs().max()), compression_of(model.config)
    known = Student(
        sum(tensor.numel() for tensor in model.parameters()), bool(record.get("activations"))
    )
    if task.pipeline == "text-generation":
        agreed, apart = _same_next(student_BC, told, scale)
        went_on = generated(model, [ids for _, ids in asked.shortest()], program["written"], scale)
        return _said(agreed, apart, scale, len(told)) | {
            "quality": None,
            "generated": went_on,
        }, known
    export_BC = torch.tensor([answer["logits"] for answer in told])
    tied_BC = comparison.break_ties(student_BC, export_BC, comparison.NEAR * scale / 2)
    said = _said(
        task.agreement(export_BC, tied_BC), (export_BC - student_BC).abs(), scale, len(told)
    )
    worth = {
        what: _quality(run, task, rows, asked.batches)
        for what, rows in (("export", export_BC), ("student", student_BC))
    }
    return said | {"quality": worth}, known


def _same_next(
    student_BC: Tensor, told: list[dict[str, Any]], scale: float
) -> tuple[Tensor, Tensor]:
    """Whether the next token is the student's; how far its logit and the normaliser are apart."""
    next_B, top_B, normaliser_B = (
        torch.tensor([answer[key] for answer in told]) for key in ("next", "top", "logsumexp")
    )
    apart = torch.stack(
        [student_BC.amax(-1) - top_B, student_BC.logsumexp(-1) - normaliser_B]
    ).abs()
    return _likeliest(student_BC, next_B, scale), apart


def _likeliest(student_BC: Tensor, chosen_B: Tensor, scale: float) -> Tensor:
    """1 where a token is the student's first choice, or tied with it within rounding."""
    return (
        student_BC.amax(-1) - student_BC.gather(1, chosen_B[:, None])[:, 0]
        <= comparison.NEAR * scale
    ).float()


@torch.inference_mode()
def generated(
    model: Any, prompts: list[list[int]], written: list[list[int]], scale: float
) -> dict[str, Any] | None:
    """How many of the tokens that a program wrote the student, which reads all before it anew, would have written; null: none."""
    right = []
    for ids, new in zip(prompts, written, strict=True) if any(written) else ():
        read = torch.tensor([[*ids, *new]])
        logits_LC = models.logits(
            model, {"input_ids": read, "attention_mask": torch.ones_like(read)}
        )[0].float()
        right += _likeliest(logits_LC[len(ids) - 1 : -1], read[0, len(ids) :], scale).tolist()
    return {"tokens": len(right), "agreement": statistics.fmean(right)} if right else None


def check_generated(found: dict[str, Any], needed: float, folder: Path, way_out: str) -> None:
    """So few tokens may fall short of a share below 1 by chance: only what is outside of their interval is refused."""
    tokens, share = found["tokens"], found["agreement"]
    if share < needed and (needed == 1 or quality.share_interval(share, tokens)[1] < needed):
        said = f"{share:.2%} of the {tokens} tokens that it generated are the student's"
        raise failed("equal", said, f"{needed:.0%} must be the same: {way_out}", folder)


def _said(agreed_B: Tensor, apart: Tensor, scale: float, rows: int) -> dict[str, Any]:
    share = float(agreed_B.mean())
    found = {
        "rows": rows,
        "agreement": share,
        "agreement_interval": quality.share_interval(share, rows),
    }
    return found | {"max_difference": float(apart.max()), "max_logit": scale}


def _quality(run: config.Run, task: Task, rows_BC: Tensor, batches: list[Batch]) -> dict[str, Any]:
    """The task's metrics of these logits, each [value, low, high]."""
    parts = [
        task.outcomes(rows, batch)
        for rows, batch in zip(
            rows_BC.split([len(each.size) for each in batches]), batches, strict=True
        )
    ]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = quality.bootstrap(task, columns, run.evaluate.bootstrap, run.seed).intervals()
    return {metric: [finite(edge) for edge in each] for metric, each in found.items()}


def law(run: config.Run, scale: float, rounds: bool) -> tuple[float, float | None, str]:
    """The least agreement, the largest difference (null: any), and what to do where they do not hold.

    `rounds`: the student's inputs of layers are rounded as they were in training.
    """
    format, quantize = (
        str(run.export.format),
        capabilities.resolve_quantize(str(run.export.format), run.export.quantize),
    )
    if quantize is None and rounds:
        return AGREEMENT_INT8, None, "set export.format=packed or dense"
    if quantize is None and run.export.dtype != "float32":
        return AGREEMENT, None, "leave export.dtype at float32"
    if quantize is None:
        return 1.0, TOLERANCE * max(1.0, scale), "report it, or set export.format=dense"
    others = [each for each in capabilities.RUNTIMES[format].quantize if each != quantize]
    first = (
        f"try export.quantize={' or '.join(others)}, leave it out"
        if others
        else "leave export.quantize out"
    )
    return AGREEMENT_INT8, None, f"{first}, or train with distill.callbacks.Quantize"
