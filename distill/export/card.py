"""What an exported folder says about itself: README.md, the model card of the Hugging Face Hub."""

import json
import os.path
from dataclasses import asdict
from typing import Any

from distill.evaluate import table
from distill.recipe import capabilities
from distill.recipe.config import Run

CLASSIFY = """from transformers import pipeline

classify = pipeline("text-classification", model="path/of/this/folder"{code})
print(classify({example}, truncation=True))"""

GENERATE = """from transformers import pipeline

write = pipeline("text-generation", model="path/of/this/folder"{code})
print(write("The", max_new_tokens=50))"""


CACHED = """It is one graph for a text and for each token that follows, which is read alone: keys and values of what was read before are
inputs (`past_key_values.*`, of length 0 at first) and outputs (`present.*`). `write` goes on with a text that way."""
UNCACHED = "It reads the whole text for each token that follows: keys and values are not cached."
TENSORRT = """The graph has the form that TensorRT calls explicit quantization: int8 weights with a scale for each output, and roundings
of the inputs of their products with one scale. TensorRT itself was not run."""


def card(
    run: Run,
    pipeline: str,
    labels: list[str],
    proof: dict[str, Any],
    metrics: dict[str, Any] | None,
) -> str:
    """The whole file."""
    parts = [
        _header(run, pipeline),
        f"# {run.name}",
        _what(run, labels),
        "## Use",
        _use(run, pipeline, proof),
        "## Measured",
    ]
    parts.append(_measured(run, metrics) if metrics else "Not measured.")
    parts += ["## How it was trained", _recipe(run), "## Proof", _proof(proof)]
    return "\n\n".join(parts) + "\n"


def _header(run: Run, pipeline: str) -> str:
    tags = ["distillation"] if run.teacher is not None else ["fine-tuned"]
    library = (
        "transformers" if run.export.format not in capabilities.RUNTIMES else run.export.format
    )
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {pipeline}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _measured(run: Run, metrics: dict[str, Any]) -> str:
    """The table of the run; said so where it was made of the student in another form than this folder's."""
    form, own = metrics.get("form", {}), asdict(run.export)
    differing = [
        f"{key} {form[key]}"
        for key in ("format", "dtype", "quantize", "bits")
        if form and form[key] != own[key]
    ]
    warning = (
        f"Of the student in another form than this folder's: {', '.join(differing)}. Of this one, see the proof.\n\n"
        if differing
        else ""
    )
    return warning + table.markdown(metrics)


def _what(run: Run, labels: list[str]) -> str:
    origin = (
        f"a student distilled from {_teacher(run)}"
        if run.teacher is not None
        else "a model trained on labels alone"
    )
    said = f"This is {origin}, on {_public(run.data.source)}."
    return f"{said} Its labels: {', '.join(labels)}." if labels else said


def _teacher(run: Run) -> str:
    assert run.teacher is not None
    if run.teacher.model is not None:
        return _public(run.teacher.model)
    return f"a {(run.teacher.config or {}).get('model_type')} teacher trained from scratch"


def _public(name: str) -> str:
    """A name as it is, but of a path on this machine only its last part."""
    path = os.path.abspath(os.path.expanduser(name))
    return (
        os.path.basename(path) if name.startswith(("/", ".", "~")) or os.path.exists(path) else name
    )


def _use(run: Run, pipeline: str, proof: dict[str, Any]) -> str:
    if proof["format"] in capabilities.RUNTIMES:
        from distill.packing import runtime_folder

        trained = any(spec.get("activations") for spec in run.callbacks.values())
        return f"{_needs_runtime(proof, pipeline, trained)}\n\n```python\n{runtime_folder.runtime_program(proof['format'], pipeline)}```"
    example = (
        '"a text"' if len(run.data.text) == 1 else '{"text": "a text", "text_pair": "another"}'
    )
    code = GENERATE if pipeline == "text-generation" else CLASSIFY.replace("{example}", example)
    code = code.replace("{code}", ", trust_remote_code=True" if proof["code"] else "")
    return f"{_needs(proof)}\n\n```python\n{code}\n```"


def _needs(proof: dict[str, Any]) -> str:
    if proof["format"] == "torchao":
        versions = proof["versions"]
        also = " and runs the two short files of code beside the weights" if proof["code"] else ""
        return f"It loads with plain transformers where torchao is installed (written with torchao {versions['torchao']}){also}."
    if proof["code"]:
        return "It loads with plain transformers, which is to run the two short files of code beside the weights: `trust_remote_code=True`."
    return "It loads with plain transformers."


def _needs_runtime(proof: dict[str, Any], pipeline: str, trained: bool) -> str:
    """What to install, and what else can be said of the files; `trained`: ranges of inputs too, on grids that TensorRT does not have."""
    libraries = [name for name in proof["versions"] if name != "python"]
    said = [
        f"It answers with {', '.join(libraries[:-1])} and {libraries[-1]} alone: `pip install {' '.join(libraries)}`."
    ]
    said += ["Run this in its folder; `answer` gives the logits of texts, a row for each."]
    if pipeline == "text-generation":
        said += [CACHED if proof["cached"] else UNCACHED]
    if proof["format"] == "onnx" and proof["quantize"] == "static" and not trained:
        said += [TENSORRT]
    if proof["quantize"] == "dynamic" and proof["format"] == "onnx":
        said += [
            "Inputs of layers are rounded over the whole batch, so that an answer depends a little on what else is in it."
        ]
    return "\n".join(said)


def _recipe(run: Run) -> str:
    """The settings that decide the result, as a list."""
    student = {key: value for key, value in asdict(run.student).items() if value is not None}
    student |= {"model": _public(run.student.model)} if run.student.model else {}
    loss = f"alpha {run.loss.alpha:g}, temperature {run.loss.temperature:g}, divergence {run.loss.divergence or 'of the task'}"
    length = (
        f"{run.trainer.max_steps} steps"
        if run.trainer.max_steps is not None
        else f"{run.trainer.epochs:g} epochs"
    )
    settings = {
        "task": json.dumps(run.task),
        "data": f"{_public(run.data.source)}, columns {', '.join(run.data.text)}",
        "teacher": _teacher(run) if run.teacher is not None else "none",
        "student": json.dumps(student),
        "loss": loss + (f", terms {', '.join(run.loss.terms)}" if run.loss.terms else ""),
        "optimizer": f"AdamW, learning rate {run.optimizer.lr:g}, {run.optimizer.schedule} schedule",
        "length": f"{length}, batches of {run.data.batch_size}",
        "compression": "; ".join(_technique(spec) for spec in run.callbacks.values())
        or "none while training",
        "seed": str(run.seed),
    }
    return "\n".join(f"- {name}: {value}" for name, value in settings.items())


def _technique(spec: dict[str, Any]) -> str:
    given = {
        key: _public(value) if isinstance(value, str) else value
        for key, value in spec.items()
        if key != "_target_"
    }
    return f"{spec['_target_'].rpartition('.')[2]} {json.dumps(given)}"


def _proof(proof: dict[str, Any]) -> str:
    size = f"It takes {proof['bytes'] / 1e6:.2f} MB on disk"
    if proof["teacher_bytes"] is not None:
        size += f", {proof['ratio']:.2f} of its teacher's {proof['teacher_bytes'] / 1e6:.2f} MB"
    how = ", ".join(
        [
            f"{proof['threads']} thread(s)",
            proof["device"],
            *(f"{name} {version}" for name, version in proof["versions"].items()),
        ]
    )
    runtime = capabilities.RUNTIMES.get(proof["format"])
    whom = "trained student" if proof["quantize"] is None or runtime else "quantized student"
    means = (
        "plain transformers"
        if runtime is None
        else f"{runtime.name} and the program above, {proof['batch']} texts at a time"
    )
    said = [
        f"In a fresh process with {means}, this folder answered {proof['texts']} held-out texts as the {whom} did:",
        f"{_agreement(proof)} of the predictions agree, and logits differ by at most {proof['max_difference']:.2g}.",
        f"{size}, {proof['bits_per_weight']:.2f} bits a weight: format {proof['format']}, and {proof['dtype']} for what is not quantized.",
        f"One text took {proof['latency_p50_ms']:.1f} ms (median, tokenising included; {how}). See `proof.json`.",
    ]
    if "faster" in proof:
        fast = proof["faster"]
        how = f'Loaded with `dtype="{fast["dtype"]}"` it took {fast["latency_p50_ms"]:.1f} ms, and {fast["agreement"]:.2%} agree'
        said.append(f"{how}: the faster way here.")
    if proof.get("generated"):
        share, tokens = proof["generated"]["agreement"], proof["generated"]["tokens"]
        said.insert(
            2,
            f"Of {tokens} tokens that it went on with, {share:.2%} are those that the student chooses.",
        )
    if proof["quantize"] is not None and runtime is None:
        apart = f"{proof['trained_agreement']:.2%} of the predictions are those of the student as it was trained"
        said.insert(2, f"It was quantized after training ({proof['quantize']}); {apart}.")
    return "\n".join(said)


def _agreement(proof: dict[str, Any]) -> str:
    share = f"{proof['agreement']:.2%}"
    if "agreement_interval" not in proof:
        return share
    low, high = proof["agreement_interval"]
    return f"{share} (95 % interval {low:.2%} to {high:.2%})"
