"""Loss and gradients of a language model from its last hidden states: all logits at once, or
chunked.

    python scripts/bench_lm_loss.py [tokens=1024,4096] [vocabulary=50257,128256] [width=768]
                                    [precisions=float32,bfloat16] [rounds=5]

Forward and backward of alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), with a head of the
given width for both models. Times are medians of interleaved rounds, in seconds of the process's
one thread. Memory is the peak beyond what hidden states, heads and a gradient of the student's head
take, measured in its own process; the new gradient of the head is part of it in both cases.
bfloat16: the student under autocast, the teacher in bfloat16.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import losses
from distill.losses import chunked
from distill.losses.chunked import FactoredLogits

DEFAULTS = {
    "tokens": "1024,4096",
    "vocabulary": "50257,128256",
    "width": "768",
    "precisions": "float32,bfloat16",
    "rounds": "5",
}
METHODS = ("full", "chunked")
HEAD_STD = 0.02  # standard deviation of the weights of a head
TITLES = "tokens | vocabulary | width | precision | full, s | chunked, s | ratio"


def loss_sums(student_NC: Tensor, teacher_NC: Tensor, labels: Tensor) -> Tensor:
    supervised_N = losses.cross_entropy(student_NC, labels)
    divergence_N = losses.forward_kl(student_NC, teacher_NC, 2.0)
    loss_N = losses.distillation(supervised_N, divergence_N, 0.5)
    return torch.stack([loss_N.sum(), supervised_N.sum(), divergence_N.sum()])


def random_logits(tokens: int, vocabulary: int, width: int, trained: bool) -> FactoredLogits:
    """Random hidden states and head, whose product are the logits."""
    hidden_ND = torch.randn(tokens, width).requires_grad_(trained)
    weight_VD = torch.randn(vocabulary, width).mul_(HEAD_STD).requires_grad_(trained)
    return FactoredLogits(hidden_ND, weight_VD, None)


class Problem(NamedTuple):
    tokens: int
    vocabulary: int
    width: int
    precision: str


def make_step(problem: Problem) -> Callable[[str], None]:
    """A function that runs one forward and backward pass with the named method."""
    torch.manual_seed(0)
    tokens, vocabulary, width, precision = problem
    bf16 = precision == "bfloat16"
    student = random_logits(tokens, vocabulary, width, trained=True)
    teacher = random_logits(tokens, vocabulary, width, trained=False)
    if bf16:
        teacher = FactoredLogits(teacher.hidden_ND.bfloat16(), teacher.weight_VD.bfloat16(), None)
    labels = torch.randint(vocabulary, (tokens,))
    for tensor in student[:2]:
        tensor.grad = torch.ones_like(tensor)

    def step(method: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits: tuple[Any, Any] = (student, teacher)
            if method == "full":
                logits = (student.logits(), chunked.teacher_chunk(teacher, slice(None)))
            loss = chunked.sum_in_chunks(loss_sums, *logits, (labels,))[0] / tokens
        loss.backward()

    return step


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def peak_memory(method: str, problem: Problem) -> float:
    """Peak MB of one step beyond what was allocated before, sampled every millisecond.

    The kernel's own peak counter would include the start of the process.
    """
    step = make_step(problem)
    before, peak, finished = resident_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(0.001):
            peak = max(peak, resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    step(method)
    finished.set()
    sampler.join()
    return (peak - before) / 1e6


def median_seconds(problem: Problem, rounds: int) -> list[float]:
    """Of each method; the first round warms up and does not count."""
    step = make_step(problem)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds + 1):
        for method, times in seconds.items():
            began = time.process_time()
            step(method)
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in seconds.values()]


def row(problem: Problem, rounds: int) -> str:
    cells = [str(value) for value in problem]
    command = [sys.executable, __file__, "memory"]
    full_mb, chunked_mb = (
        float(subprocess.check_output([*command, method, *cells], text=True)) for method in METHODS
    )
    full_s, chunked_s = median_seconds(problem, rounds)
    times = f"{full_s:.2f} | {chunked_s:.2f} | {chunked_s / full_s:.2f}"
    memory = f"{full_mb:,.0f} | {chunked_mb:,.0f} | {chunked_mb / full_mb:.3f}"
    return f"| {' | '.join(cells)} | {times} | {memory} |"


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        method, tokens, vocabulary, width, precision = sys.argv[2:]
        print(peak_memory(method, Problem(int(tokens), int(vocabulary), int(width), precision)))
        return
    options = DEFAULTS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(f"| {TITLES} | full, MB | chunked, MB | ratio |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for vocabulary in options["vocabulary"].split(","):
        for tokens in options["tokens"].split(","):
            for precision in options["precisions"].split(","):
                sizes = (int(tokens), int(vocabulary), int(options["width"]))
                print(row(Problem(*sizes, precision), int(options["rounds"])), flush=True)


if __name__ == "__main__":
    main()
