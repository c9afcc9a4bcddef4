"""The parts of gpu_report.py: each yields figures with their goals on one H100."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import bench_checkpoints
import bench_lm_loss
import gpu_steps
import torch
from gpu_steps import Job, Measured

from distill.training.checkpoint_files import checkpoint_path
from distill.training.checkpoint_writer import AtomicCheckpointIO

ROOT = Path(__file__).parents[1]
PEAK_FLOPS = 989e12  # of an H100 in bfloat16, datasheet
TOKENS, WIDTH, ROUNDS = 8192, 2048, 3


class Figure(NamedTuple):
    """A row of the report.

    Args:
        name: What was measured.
        measured: The value, with its unit.
        goal: What it should be.
        held: Whether it is; None where there is no goal.
    """

    name: str
    measured: str
    goal: str = ""
    held: bool | None = None


def ratio(name: str, value: float, most: float, others: str = "") -> Figure:
    """A ratio that should be at most this."""
    return Figure(name, f"{value:.2f}{others}", f"<= {most:g}", value <= most)


def loss(device: str = "cuda", small: bool = False) -> Iterator[Figure]:
    """The chunked loss against all logits at once."""
    goals = ((1000, 1.0, 1.0),) if small else ((128_256, 0.6, 0.11), (32_000, 0.8, 0.15))
    tokens, width = (64, 32) if small else (TOKENS, WIDTH)
    for vocabulary, most_time, most_memory in goals:
        problem = bench_lm_loss.Problem(tokens, vocabulary, width, "bfloat16", device)
        (full_s, chunked_s), (full_mb, chunked_mb) = bench_lm_loss.measure(problem, ROUNDS)
        name = f"chunked CE + KL, {tokens} x {width} x {vocabulary:,}, bf16, against all logits"
        milliseconds = f" ({1e3 * full_s:.1f} -> {1e3 * chunked_s:.1f} ms)"
        yield ratio(f"{name}: time", chunked_s / full_s, most_time, milliseconds)
        size = f" ({full_mb / 1e3:.2f} -> {chunked_mb / 1e3:.2f} GB)"
        yield ratio(f"{name}: memory", chunked_mb / full_mb, most_memory, size)
    yield from _product_errors(device)


def _product_errors(device: str) -> Iterator[Figure]:
    """The head's product in bfloat16 against float64 of the same rounded factors."""
    for noise, most in ((0.0123, 0.03), (0.0401, 0.01)):
        rounded, product = bench_lm_loss.product_errors(noise, device)
        name = f"gradient of hidden states at a KL of {product[1]:.4f} nats a token, error"
        errors = f"{product[2].hidden:.2%} (logits rounded to bf16: {rounded[2].hidden:.1%})"
        yield Figure(name, errors, f"<= {most:.0%}", product[2].hidden <= most)
        value = product[2].value
        yield Figure("the KL's value there, error", f"{value:.2%}", "<= 1%", value <= 0.01)


def language(device: str = "cuda", small: bool = False) -> Iterator[Figure]:
    """A step of a language model: 1.1 B parameters online -> 0.5 B, 8 x 1024 tokens."""
    job = gpu_steps.llama(device, small)
    steps, warm = (2, 1) if small else (12, 4)
    ways = {
        "bare loop": lambda: gpu_steps.bare(job, warm, steps),
        "ours": lambda: gpu_steps.ours(job, warm, steps),
    }
    results = gpu_steps.in_turns(ways, 2)
    yield from _language_figures(job, results, "")
    compiled = gpu_steps.ours(job, warm + 2, steps, compile=True)
    compared = {"bare loop": results["bare loop"], "ours": compiled}
    yield from _language_figures(job, compared, ", trainer.compile")
    yield from _profile(job)


def _language_figures(job: Job, results: dict[str, Measured], way: str) -> Iterator[Figure]:
    theirs, ours = results["bare loop"], results["ours"]
    name = f"language model, online teacher{way}"
    details = f" ({theirs.milliseconds:.0f} -> {ours.milliseconds:.0f} ms a step)"
    quotient = ours.milliseconds / theirs.milliseconds
    yield ratio(f"{name}: step against a bare loop", quotient, 0.70, details)
    flops = job.model_flops(job.make_student())
    shares = [1e3 * flops / each.milliseconds / PEAK_FLOPS for each in (theirs, ours)]
    goal = f"0.40 (bare loop: {shares[0]:.2f})"
    yield Figure(f"{name}: model FLOPs utilization", f"{shares[1]:.2f}", goal, shares[1] >= 0.40)
    speed = f"{1e3 * job.tokens / ours.milliseconds:,.0f}"
    memory = f"{ours.peak_gb:.1f} GB (bare loop {theirs.peak_gb:.1f})"
    yield Figure(f"{name}: tokens/s; peak memory", f"{speed}; {memory}")


def _profile(job: Job) -> Iterator[Figure]:
    rows = gpu_steps.profile_step(job)
    total = sum(milliseconds for _, milliseconds, _ in rows)
    yield Figure("profile of this step: all kernels", f"{total:.1f} ms")
    for name, milliseconds, calls in islice(rows, 10):
        short = re.sub(r"\s+", " ", name)[:70].replace("|", "/")
        yield Figure(f"profile: {short}", f"{milliseconds:.1f} ms in {calls} calls")


def small(device: str = "cuda", small: bool = False) -> Iterator[Figure]:
    """A step of a small BERT with a cached teacher, and the waits of its steps."""
    job = gpu_steps.small_bert(device, small)
    steps, warm = (2, 1) if small else (40, 8)
    ways = {
        "bare loop": lambda: gpu_steps.bare(job, warm, steps),
        "plain": lambda: gpu_steps.ours(job, warm, steps),
    }
    results = gpu_steps.in_turns(ways, ROUNDS)
    results["compiled"] = gpu_steps.ours(job, 3 * warm, steps, compile=True)
    name = "small BERT, 32 x 32 tokens, cached teacher, step against a bare loop"
    theirs = results["bare loop"].milliseconds
    for way, most in (("plain", 1.03), ("compiled", 0.4)):
        mine = results[way].milliseconds
        details = f" ({theirs:.2f} -> {mine:.2f} ms)"
        yield ratio(f"{name}: {way}", mine / theirs, most, details)
    if device == "cuda":
        count = gpu_steps.waits(job)
        yield Figure(
            "CPU-GPU sync points in 8 steps that are not logged", str(count), "0", not count
        )


def checkpoint(device: str = "cuda", gb: float = 6.6) -> Iterator[Figure]:
    """A checkpoint of the state of a student of 0.5 B parameters."""
    state = bench_checkpoints.make_state(gb * 1e9, device)
    matrix = torch.rand(bench_checkpoints.WIDTH, bench_checkpoints.WIDTH, device=device)
    with tempfile.TemporaryDirectory() as folder:
        writer = AtomicCheckpointIO(keep=1)
        file = checkpoint_path(Path(folder), 1)
        saved = bench_checkpoints.in_background(writer, state, file, matrix)
        writer.teardown()
    details = f" s (complete after {saved.complete:.1f} s)"
    yield ratio(f"checkpoint of {gb:g} GB: training stands still", saved.still, 1.0, details)


def stages() -> Iterator[Figure]:
    """Evaluate and export of the main recipe, from the folder of its run."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "distill.train", "recipe=bert_to_distil"]
        command += ["trainer.accelerator=gpu", "tracking.wandb=disabled", f"hydra.run.dir={name}"]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        metrics = json.loads((Path(name) / "metrics.json").read_text())
    seconds: dict[str, Any] = metrics["stages"]
    both = seconds["evaluate"] + seconds["export"]
    details = f" s ({seconds['evaluate']:.1f} + {seconds['export']:.1f})"
    yield ratio("recipe=bert_to_distil: evaluate + export", both, 12, details)
    others = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    yield Figure("recipe=bert_to_distil: stages, s", others)
    yield Figure("recipe=bert_to_distil: the command, s", f"{time.monotonic() - began:.1f}")


def tests() -> Iterator[Figure]:
    """The tests with the mark `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests"]
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    for line in lines:
        if line.startswith("FAILED"):
            yield Figure(line[:150], "failed", "passed", False)
    yield Figure("pytest -m gpu", lines[-1].strip("= "), "passed", done.returncode == 0)
    yield ratio("pytest -m gpu, s", time.monotonic() - began, 90)
