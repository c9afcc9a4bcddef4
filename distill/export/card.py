"""README.md of an exported folder: the model card of the Hugging Face Hub."""

import json
import os.path
from dataclasses import asdict
from typing import Any

from distill.evaluate import Metrics, table
from distill.export.card_metadata import Origin, metadata, origins
from distill.export.proof_record import Proof
from distill.packing import runtime_folder
from distill.recipe import capabilities, config
from distill.recipe.references import hide
from distill.tasks.base import Task

TENSORRT = (
    "The graph has the form that TensorRT calls explicit quantization: int8 weights with a scale "
    "for each output, and\nthe inputs of their products quantized with one scale. TensorRT itself "
    "was not run."
)
BATCH_RANGE = (
    "Inputs of layers are quantized over the range of a batch, so that predictions depend slightly "
    "on the other texts in the batch."
)


def card(run: config.Run, task: Task, proof: Proof, metrics: Metrics | None) -> str:
    """The contents of README.md.

    Args:
        run: the recipe.
        task: bound to the labels of the data.
        proof: the proof of this export.
        metrics: the metrics of the run; None if nothing was measured.
    """
    techniques = capabilities.techniques_of(run.callbacks)
    trained = any(technique.activations for technique in techniques)
    made_from = origins(run.student, run.teacher)
    quality = _quality(run.export, proof, metrics)
    parts = [
        metadata(run.name, run.data, task, run.export.format, quality, made_from),
        f"# {run.name}",
        _description(task, run.data, run.teacher),
        *_licenses(made_from.models),
        "## Use",
        _usage(task, run.data, proof, trained),
        "## Measured",
        _measured(run.export, metrics) if metrics else "Not measured.",
        "## How it was trained",
        _recipe(run),
        "## Proof",
        _proof(proof),
    ]
    return hide("\n\n".join(parts) + "\n")


def _description(task: Task, data: config.Data, teacher: config.Teacher | None) -> str:
    origin = (
        f"a student distilled from {_teacher(teacher)}"
        if teacher is not None
        else "a model trained on labels only"
    )
    text = f"This is {origin}, on {_public(data.source)}."
    return f"{text} Its labels: {', '.join(task.names)}." if task.names else text


def _licenses(made_from: list[Origin]) -> list[str]:
    """A line with the licenses of the models that it was made from, where they differ."""
    named = {
        _public(origin.name): origin.license.get("license_name") or origin.license["license"]
        for origin in made_from
        if "license" in origin.license
    }
    if len(set(named.values())) < 2:
        return []
    licenses = ", ".join(f"{name} {license}" for name, license in named.items())
    return [f"The models that it was made from have different licenses: {licenses}."]


def _teacher(teacher: config.Teacher) -> str:
    if teacher.outputs == "served":
        return teacher.served_model or teacher.model or "a teacher that was served"
    if teacher.model is not None:
        return _public(teacher.model)
    return f"a {(teacher.config or {}).get('model_type')} teacher trained from scratch"


def _public(name: str) -> str:
    """The name, shortened to its last part if it is a path on this machine."""
    path = os.path.abspath(os.path.expanduser(name))
    is_path = name.startswith(("/", ".", "~")) or os.path.exists(path)
    return os.path.basename(path) if is_path else name


def _usage(task: Task, data: config.Data, proof: Proof, trained: bool) -> str:
    """How to use the folder; `trained`: whether inputs of layers were quantized in training."""
    if proof.format in capabilities.RUNTIMES:
        program = runtime_folder.runtime_program(proof.format, task)
        return f"{_runtime_needs(task, proof, trained)}\n\n```python\n{program}```"
    code = task.usage(data, ", trust_remote_code=True" if proof.code else "")
    return f"{_needs(proof)}\n\n```python\n{code}\n```"


def _needs(proof: Proof) -> str:
    if proof.format == "lora":
        return (
            "It is an adapter, which plain transformers adds to its base model where peft is "
            f"installed (written with peft {proof.versions['peft']})."
        )
    if proof.format == "torchao":
        code = " and runs the two short files of code beside the weights" if proof.code else ""
        return (
            "It loads with plain transformers where torchao is installed "
            f"(written with torchao {proof.versions['torchao']}){code}."
        )
    if proof.code:
        return (
            "It loads with plain transformers, which must run the two short files of code beside "
            "the weights: `trust_remote_code=True`."
        )
    return "It loads with plain transformers."


def _runtime_needs(task: Task, proof: Proof, trained: bool) -> str:
    """What to install, and notes; `trained`: whether inputs were quantized in training."""
    *first, last = libraries = [name for name in proof.versions if name != "python"]
    lines = [
        f"It needs only {', '.join(first)} and {last}: `pip install {' '.join(libraries)}`.",
        "Run this in its folder; `predict` returns the logits of texts, one row per text.",
        *task.runtime_notes(bool(proof.cached)),
    ]
    if proof.format == "onnx" and proof.quantize == "static" and not trained:
        lines.append(TENSORRT)
    if proof.format == "onnx" and proof.quantize == "dynamic":
        lines.append(BATCH_RANGE)
    return "\n".join(lines)


def _measured(settings: config.Export, metrics: Metrics) -> str:
    """The table of the run, with a warning if the student was measured in another format."""
    differing = _other_form(settings, metrics)
    warning = (
        f"Measured on the student in another format than this folder: {', '.join(differing)}. "
        "For this folder, see the proof.\n\n"
        if differing
        else ""
    )
    return warning + table.markdown(metrics)


def _other_form(settings: config.Export, metrics: Metrics) -> list[str]:
    """The settings of the measured student that are not those of this export."""
    form, current = metrics.form or {}, asdict(settings)
    keys = ("format", "dtype", "quantize", "bits")
    return [f"{key} {form[key]}" for key in keys if form and form[key] != current[key]]


def _quality(settings: config.Export, proof: Proof, metrics: Metrics | None) -> dict[str, float]:
    """The metrics of this export: those of its proof in a runtime, or of the measured student."""
    if proof.quality is not None:
        return {name: value for name, (value, *_) in proof.quality["export"].items()}
    if metrics is None or _other_form(settings, metrics):
        return {}
    measured = metrics.models["student"].quality
    return {name: interval.value for name, interval in measured.items()}


def _recipe(run: config.Run) -> str:
    """The settings that decide the result, as a list."""
    optimizer = run.optimizer
    settings = {
        "task": json.dumps(run.task),
        "data": f"{_public(run.data.source)}, columns {', '.join(run.data.text)}",
        "teacher": _teacher(run.teacher) if run.teacher is not None else "none",
        "student": _student(run.student),
        "loss": _loss(run.loss),
        "optimizer": f"AdamW, learning rate {optimizer.lr:g}, {optimizer.schedule} schedule",
        "length": f"{_length(run.trainer)}, batches of {run.data.batch_size}",
        "compression": "; ".join(map(_technique, run.callbacks.values())) or "none while training",
        "seed": str(run.seed),
    }
    return "\n".join(f"- {name}: {value}" for name, value in settings.items())


def _student(student: config.Student) -> str:
    values = {key: value for key, value in asdict(student).items() if value is not None}
    return json.dumps(values | ({"model": _public(student.model)} if student.model else {}))


def _loss(loss: config.Loss) -> str:
    parts = [
        f"alpha {loss.alpha:g}",
        f"temperature {loss.temperature:g}",
        f"divergence {loss.divergence or 'of the task'}",
    ]
    if loss.class_weights is not None:
        parts.append(f"class weights {loss.class_weights}")
    return ", ".join(parts + ([f"terms {', '.join(loss.terms)}"] if loss.terms else []))


def _length(trainer: config.Trainer) -> str:
    if trainer.max_steps is not None:
        return f"{trainer.max_steps} steps"
    return f"{trainer.epochs:g} epochs"


def _technique(spec: dict[str, Any]) -> str:
    arguments = {
        key: _public(value) if isinstance(value, str) else value
        for key, value in spec.items()
        if key != "_target_"
    }
    return f"{spec['_target_'].rpartition('.')[2]} {json.dumps(arguments)}"


def _proof(proof: Proof) -> str:
    runtime = capabilities.RUNTIMES.get(proof.format)
    quantized = proof.quantize is not None and runtime is None
    environment = (
        f"{runtime.runtime} and the program above, {proof.batch} texts at a time"
        if runtime
        else "plain transformers"
    )
    student = "quantized student" if quantized else "trained student"
    lines = [
        f"In a fresh process with {environment}, this folder was compared with the {student} on "
        f"{proof.texts} held-out texts:",
        f"{_agreement(proof)} of the predictions agree, and logits differ by at most "
        f"{proof.max_difference:.2g}.",
    ]
    if proof.near_ties:
        lines.append(
            f"Of the {proof.rows} predictions, {proof.near_ties} differ only where the student's "
            f"two likeliest are nearer to each other than {proof.dtype} can tell."
        )
    if quantized:
        lines.append(
            f"It was quantized after training ({proof.quantize}); {proof.trained_agreement:.2%} of "
            "the predictions are those of the student before that."
        )
    if proof.generated is not None:
        lines.append(
            f"Of {proof.generated.tokens} tokens that it generated, "
            f"{proof.generated.agreement:.2%} are the student's."
        )
    lines += [_size(proof), _latency(proof)]
    if proof.faster is not None:
        lines.append(
            f'Loaded with `dtype="{proof.faster.dtype}"` it took {proof.faster.latency_p50_ms:.1f} '
            f"ms, and {proof.faster.agreement:.2%} agree: the faster way here."
        )
    return "\n".join(lines)


def _agreement(proof: Proof) -> str:
    if proof.agreement_interval is None:
        return f"{proof.agreement:.2%}"
    low, high = proof.agreement_interval
    return f"{proof.agreement:.2%} (95 % interval {low:.2%} to {high:.2%})"


def _size(proof: Proof) -> str:
    text = f"It takes {proof.bytes / 1e6:.2f} MB on disk"
    if proof.teacher_bytes is not None:
        text += f", {proof.ratio:.2f} of its teacher's {proof.teacher_bytes / 1e6:.2f} MB"
    return (
        f"{text}, {proof.bits_per_weight:.2f} bits per weight: format {proof.format}, and "
        f"{proof.dtype} for what is not quantized."
    )


def _latency(proof: Proof) -> str:
    versions = (f"{name} {version}" for name, version in proof.versions.items())
    conditions = ", ".join([f"{proof.threads} thread(s)", proof.device, *versions])
    return (
        f"One text took {proof.latency_p50_ms:.1f} ms (median, tokenization included; "
        f"{conditions}). See `proof.json`."
    )
