"""The proof of a runtime's export: its program has the outputs of the trained student.

Both run the same batches, because a runtime may quantize over the range of a batch.

N = compared rows, V = vocabulary, L = tokens of a text.
"""

import json
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import isolated, models
from distill.evaluate import quality
from distill.evaluate.cost import disk_bytes
from distill.evaluate.record_parts import replace_nan
from distill.export.checks import Tolerance, check_equal, check_smaller, export_failed
from distill.export.proof_inputs import ProofInputs, compute_logits, compute_rows
from distill.export.proof_record import Generated, Proof
from distill.losses.chunked import full_logits
from distill.packing import runtime_folder
from distill.recipe import capabilities, config
from distill.remote_code.modeling import CompressionConfig
from distill.tasks.batch import Batch
from distill.tasks.comparison import NotComparableError, RuntimeComparison, is_likeliest

TOLERANCE = 1e-5  # largest difference of logits in float32, relative to the largest logit
AGREEMENT = 0.99  # share of predictions that an export in bfloat16 keeps
AGREEMENT_INT8 = 0.97  # the same in int8
PROMPTS, NEW_TOKENS = 4, 8  # texts from which a language model generates, and tokens of each

Prompts = list[tuple[str, list[int]]]  # texts and their tokens


class StudentFacts(NamedTuple):
    """Properties of the student that the proof needs."""

    parameters: int
    # Rounding then turns a tiny difference before a linear layer into 1 / 256 of the range.
    quantized_inputs: bool


def prove(inputs: ProofInputs, draft: Path) -> Proof:
    """Check that the draft is loadable, equal to the trained student and smaller, in this order.

    Raises:
        RunFailed: if it is not; the message names the requirement.
    """
    spec, size = inputs.spec, inputs.evaluate.batch_size
    settings, runtime = spec.settings, capabilities.RUNTIMES[str(spec.settings.format)]
    batches = inputs.batches(size, keep_end=True)
    prompts = spec.task.prompts(inputs.cells, batches, PROMPTS)
    response = run_program(inputs, prompts, draft)
    comparison, generated, student = _compare(inputs, batches, prompts, response)
    agreement = float(comparison.agreed_N.mean())
    tolerance = choose_tolerance(settings, comparison.scale, student.quantized_inputs)
    check_equal(agreement, comparison.difference, tolerance, inputs.trained)
    if generated is not None:
        check_generated(generated, tolerance, inputs.trained)
    sizes = check_smaller(
        draft, inputs.teacher, inputs.trained, runtime.weight_files, settings.smaller
    )
    rows = len(comparison.agreed_N)
    return Proof(
        texts=len(inputs.texts),
        rows=rows,
        agreement=agreement,
        agreement_interval=[*quality.share_interval(agreement, rows)],
        max_difference=comparison.difference,
        tolerance=tolerance.difference,
        max_logit=comparison.scale,
        quality=_quality(inputs, comparison, batches),
        generated=generated,
        bits_per_weight=8 * disk_bytes(draft, runtime.weight_files) / student.parameters,
        latency_p50_ms=1000 * statistics.median(response["seconds"]),
        format=runtime.name,
        dtype=settings.stored_dtype,
        quantize=capabilities.resolve_quantize(runtime.name, settings.quantize),
        code=False,
        batch=size,
        cached=json.loads((draft / "config.json").read_text())["cached"],
        threads=inputs.evaluate.threads,
        device="cpu",
        versions=response["versions"],
        **sizes._asdict(),
    )


def run_program(inputs: ProofInputs, prompts: Prompts, draft: Path) -> dict[str, Any]:
    """The outputs of the draft's program in a fresh process; RunFailed if it fails."""
    task, runtime = inputs.spec.task, capabilities.RUNTIMES[str(inputs.spec.settings.format)]
    cells, size = inputs.cells, inputs.evaluate.batch_size
    request = {
        "folder": str(draft.resolve()),
        "program": runtime_folder.runtime_program(runtime.name, task),
        "batches": [cells[first : first + size] for first in range(0, len(cells), size)],
        "logits": task.answer == "logits",
        "prompts": [text for text, _ in prompts],
        "max_new_tokens": NEW_TOKENS,
        "threads": inputs.evaluate.threads,
        "libraries": runtime.libraries,
        "blocked": list(runtime.blocked),
    }
    try:
        return isolated.run_isolated("program_proof", request)
    except isolated.ProcessError as error:
        raise export_failed(
            "loadable",
            f"{runtime.runtime} cannot use it ({error})",
            "its program must run with its runtime only",
            inputs.trained,
        ) from error


def _compare(
    inputs: ProofInputs, batches: Sequence[Batch], prompts: Prompts, response: dict[str, Any]
) -> tuple[RuntimeComparison, Generated | None, StudentFacts]:
    """Compare the outputs of the program with those of the trained student."""
    with inputs.load_student(inputs.trained, "cpu") as model:
        served = served_logits(inputs, model, batches)
        facts = StudentFacts(
            sum(tensor.numel() for tensor in model.parameters()),
            bool(CompressionConfig.from_config(model.config).activations),
        )
        try:
            comparison = inputs.spec.task.compare_runtime(response["outputs"], batches, served)
        except NotComparableError as error:
            raise export_failed(
                "equal",
                str(error),
                "its outputs must be those of the trained student",
                inputs.trained,
            ) from error
        ids = [ids for _, ids in prompts]
        generated = compare_generated(model, ids, response["generated"], comparison.scale)
    return comparison, generated, facts


def served_logits(inputs: ProofInputs, model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """The student's logits of each batch, as a program returns them."""
    task = inputs.spec.task
    if task.compares_positions:
        select = compute_rows(
            model, batches, lambda out, batch: task.served_logits(out, batch.inputs)
        )
        return [full_logits(rows).cpu() for rows in select]
    return [
        task.served_logits(logits, batch.inputs)
        for logits, batch in zip(compute_logits(model, batches), batches, strict=True)
    ]


@torch.inference_mode()
def compare_generated(
    model: Any, prompts: list[list[int]], generated: list[list[int]], scale: float
) -> Generated | None:
    """The share of generated tokens that are the student's likeliest ones; None without tokens.

    The student runs without a cache of keys and values.
    """
    if not any(generated):
        return None
    agreed: list[float] = []
    has_linear_head = models.has_linear_head(model)
    for ids, new in zip(prompts, generated, strict=True):
        tokens_1L = torch.tensor([[*ids, *new]])
        inputs = {"input_ids": tokens_1L, "attention_mask": torch.ones_like(tokens_1L)}
        first = len(ids) - 1
        select = operator.itemgetter((0, slice(first, -1)))
        rows = models.evaluated_rows(model, inputs, select, has_linear_head)
        agreed += is_likeliest(full_logits(rows), tokens_1L[0, len(ids) :], scale).tolist()
    return Generated(len(agreed), statistics.fmean(agreed))


def check_generated(generated: Generated, tolerance: Tolerance, student: Path) -> None:
    """Raise RunFailed if too few generated tokens agree.

    With so few tokens a share below 1 may be missed by chance: the end of its 95 % interval counts.
    """
    needed, share = tolerance.agreement, generated.agreement
    if share >= needed:
        return
    if needed < 1 and quality.share_interval(share, generated.tokens)[1] >= needed:
        return
    raise export_failed(
        "equal",
        f"{share:.2%} of the {generated.tokens} tokens that it generated are the student's",
        f"{needed:.0%} must be the same: {tolerance.way_out}",
        student,
    )


def _quality(
    inputs: ProofInputs, comparison: RuntimeComparison, batches: Sequence[Batch]
) -> dict[str, Any] | None:
    """The task's metrics of export and student, each [value, low, high]; None without logits."""
    if comparison.export is None or comparison.student is None:
        return None
    both = {"export": comparison.export, "student": comparison.student}
    return {name: _metrics(inputs, rows, batches) for name, rows in both.items()}


def _metrics(
    inputs: ProofInputs, rows: Sequence[Tensor], batches: Sequence[Batch]
) -> dict[str, Any]:
    task = inputs.spec.task
    columns = task.joined_outcomes(rows, batches)
    resampled = quality.bootstrap(task, columns, inputs.evaluate.bootstrap, inputs.seed)
    intervals = resampled.intervals()
    return {name: [replace_nan(end) for end in interval] for name, interval in intervals.items()}


def choose_tolerance(settings: config.Export, scale: float, quantized_inputs: bool) -> Tolerance:
    """How close an export must be to the student.

    Args:
        settings: the recipe's section `export`.
        scale: the student's largest absolute logit.
        quantized_inputs: whether inputs of layers were quantized in training.
    """
    format = str(settings.format)
    quantize = capabilities.resolve_quantize(format, settings.quantize)
    if quantize is not None:
        others = [mode for mode in capabilities.RUNTIMES[format].quantize if mode != quantize]
        first = (
            f"try export.quantize={' or '.join(others)}, leave it out"
            if others
            else "leave export.quantize out"
        )
        way_out = f"{first}, or train with distill.callbacks.Quantize"
        return Tolerance(AGREEMENT_INT8, None, way_out)
    if quantized_inputs:
        return Tolerance(AGREEMENT_INT8, None, "set export.format=packed or dense")
    if settings.stored_dtype != "float32":
        return Tolerance(AGREEMENT, None, "leave export.dtype at float32")
    way_out = "report it, or set export.format=dense"
    return Tolerance(1.0, TOLERANCE * max(1.0, scale), way_out)
