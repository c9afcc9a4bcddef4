"""The proof of an export that transformers loads.

A fresh process that cannot import this library loads it and runs held-out texts. Its outputs are
compared with those of the student in this process.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import isolated
from distill.evaluate.cost import weight_bytes
from distill.export.checks import Tolerance, check_equal, check_smaller, export_failed
from distill.export.proof_inputs import ProofInputs, compute_logits, compute_rows
from distill.export.proof_record import FasterDtype, Proof
from distill.models import best_attention
from distill.recipe import capabilities, config
from distill.remote_code.modeling import CompressionConfig
from distill.tasks.comparison import Comparison, NotComparableError

TOLERANCE = 1e-4  # largest difference of logits in float32, relative to the largest logit
AGREEMENT = 0.99  # share of predictions that an export with fewer bits keeps

Outputs = Sequence[dict[str, Any]]  # one per text


def prove(inputs: ProofInputs, draft: Path, student: Path) -> Proof:
    """Check that the draft is loadable, equal to `student` and smaller, in this order.

    Raises:
        RunFailed: if it is not; the message names the requirement.
    """
    settings = inputs.spec.settings
    response = _run_export(inputs, draft)
    stored = response["outputs"].pop("stored")
    comparison = _compare(inputs, student, stored)
    tolerance = _tolerance(settings, comparison.scale)
    ties = comparison.near_ties.get(settings.stored_dtype)
    agreement = comparison.agreement + (ties or 0) / comparison.rows
    check_equal(agreement, comparison.difference, tolerance, inputs.trained)
    trained = None if settings.quantize is None else _compare(inputs, inputs.trained, stored)
    sizes = check_smaller(draft, inputs.teacher, inputs.trained, smaller=settings.smaller)
    latency = _median_ms(stored)
    return Proof(
        texts=len(inputs.texts),
        rows=comparison.rows,
        agreement=comparison.agreement,
        near_ties=ties,
        max_difference=comparison.difference,
        tolerance=tolerance.difference,
        max_logit=comparison.scale,
        trained_agreement=trained.agreement if trained else None,
        trained_max_difference=trained.difference if trained else None,
        bits_per_weight=8 * weight_bytes(draft) / response["parameters"],
        latency_p50_ms=latency,
        faster=_fastest(inputs, student, response["outputs"], latency),
        format=str(settings.format),
        dtype=settings.stored_dtype,
        quantize=settings.quantize,
        code=_has_code(draft),
        threads=inputs.evaluate.threads,
        device=inputs.device,
        versions=response["versions"],
        **sizes._asdict(),
    )


def _run_export(inputs: ProofInputs, draft: Path) -> dict[str, Any]:
    """The outputs of a fresh process; RunFailed if it cannot load the draft."""
    spec, quantized_inputs = inputs.spec, _has_quantized_inputs(draft)
    # A float32 model may be faster in bfloat16; a compressed one computes in float32.
    plain = spec.settings.format == "dense" and spec.settings.stored_dtype == "float32"
    packages = capabilities.FORMATS[str(spec.settings.format)].packages
    request = {
        "folder": str(draft.resolve()),
        "auto_class": spec.task.auto_class,
        "pipeline": spec.task.pipeline,
        "predict": spec.task.proof,
        "texts": spec.task.proof_requests(inputs.cells, inputs.examples(), spec.tokenizer),
        "threads": inputs.evaluate.threads,
        "device": inputs.device,
        # Another attention kernel could round a quantized input differently.
        "attention": best_attention() if quantized_inputs else None,
        "libraries": ["torch", "transformers", *packages],
        "trust_remote_code": _has_code(draft),
        "dtypes": ["bfloat16"] if plain and not quantized_inputs else [],
        "blocked": ["distill"],
    }
    try:
        return isolated.run_isolated("transformers_proof", request)
    except isolated.ProcessError as error:
        raise export_failed(
            "loadable",
            f"plain transformers cannot use it ({error})",
            "it must load without this library",
            inputs.trained,
        ) from error


def _compare(inputs: ProofInputs, student: Path, outputs: Outputs) -> Comparison:
    """Compare the outputs with those of a student that is loaded in this process."""
    task, batches = inputs.spec.task, inputs.examples()
    try:
        with inputs.load_student(student, inputs.device) as model:
            logits = (
                compute_rows(model, batches, lambda positions, _: positions.flatten(0, 1))
                if task.compares_positions
                else compute_logits(model, batches)
            )
            return task.compare(outputs, batches, logits, model.config)
    except NotComparableError as error:
        raise export_failed(
            "equal", str(error), "its outputs must be those of the trained student", inputs.trained
        ) from error


def _tolerance(settings: config.Export, scale: float) -> Tolerance:
    """In float32 all predictions and logits must agree, with fewer bits most predictions."""
    if settings.stored_dtype == "float32":
        return Tolerance(1.0, TOLERANCE * max(1.0, scale))
    return Tolerance(AGREEMENT, None)


def _fastest(
    inputs: ProofInputs, student: Path, outputs: dict[str, Outputs], latency: float
) -> FasterDtype | None:
    """The fastest other dtype in which the predictions still agree; None if there is none."""
    fastest = None
    for dtype, outputs_of_dtype in outputs.items():
        if _median_ms(outputs_of_dtype) >= latency:
            continue
        agreement = _compare(inputs, student, outputs_of_dtype).agreement
        if agreement >= AGREEMENT:
            latency = _median_ms(outputs_of_dtype)
            fastest = FasterDtype(dtype, latency, agreement)
    return fastest


def _median_ms(outputs: Outputs) -> float:
    return 1000 * statistics.median(output["seconds"] for output in outputs)


def _has_quantized_inputs(draft: Path) -> bool:
    content = _read_config(draft)
    compression = CompressionConfig.from_json(content.get("compression"))
    return bool(compression.activations) or "quantization_config" in content


def _has_code(draft: Path) -> bool:
    return "auto_map" in _read_config(draft)


def _read_config(draft: Path) -> dict[str, Any]:
    """The model's config; empty for an adapter, which has that of its base model."""
    file = draft / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
