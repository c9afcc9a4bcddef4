"""Loss and gradients of a language model from its last hidden states: all logits at once, or
chunked.

    python scripts/bench_lm_loss.py [device=cpu|cuda] [tokens=1024,4096] [vocabulary=50257,128256]
                                    [width=768] [precisions=float32,bfloat16] [rounds=5]

Forward and backward of alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), with a head of the
given width for both models. The device is a GPU if there is one, and then the defaults are 8192
tokens, vocabularies of 32,000 and 128,256, a width of 2048, and bfloat16.

Times are medians of interleaved rounds: seconds of the process's one thread on a CPU, of CUDA
events on a GPU. Memory is the peak beyond what hidden states, heads and a gradient of the student's
head take; the new gradient of the head is part of it in both cases. On a CPU it is measured in its
own process. bfloat16: the student under autocast, the teacher in bfloat16. All logits at once are
those of `torch.nn.functional.linear` on a GPU; on a CPU, whose product in bfloat16 may be slow,
they are multiplied as the chunks are.

The last table is the error of the gradients in low precision, against float64 of the same rounded
factors; `linear` is with logits that autocast rounds.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses import chunked
from distill.losses.chunked import FactoredLogits
from distill.losses.fused import FusedLoss

DEFAULTS = {
    "cpu": {
        "tokens": "1024,4096",
        "vocabulary": "50257,128256",
        "width": "768",
        "precisions": "float32,bfloat16",
        "rounds": "5",
    },
    "cuda": {
        "tokens": "8192",
        "vocabulary": "32000,128256",
        "width": "2048",
        "precisions": "bfloat16",
        "rounds": "5",
    },
}
LOSS = FusedLoss(alpha=0.5, temperature=2.0, divergence="forward_kl")
METHODS = ("full", "chunked")
HEAD_STD = 0.02  # standard deviation of the weights of a head
TITLES = "tokens | vocabulary | width | precision | full, s | chunked, s | ratio"


class Problem(NamedTuple):
    tokens: int
    vocabulary: int
    width: int
    precision: str
    device: str


def random_logits(problem: Problem, trained: bool) -> FactoredLogits:
    """Random hidden states and head, whose product are the logits."""
    tokens, vocabulary, width, _, device = problem
    hidden_ND = torch.randn(tokens, width, device=device)
    weight_VD = torch.randn(vocabulary, width, device=device).mul_(HEAD_STD)
    if problem.precision == "bfloat16":  # a block's output has the dtype of autocast
        hidden_ND = hidden_ND.bfloat16() if device == "cuda" or not trained else hidden_ND
        weight_VD = weight_VD if trained else weight_VD.bfloat16()
    return FactoredLogits(
        hidden_ND.requires_grad_(trained), weight_VD.requires_grad_(trained), None
    )


def all_logits(factors: FactoredLogits) -> Tensor:
    """All logits at once."""
    return F.linear(*factors) if factors.hidden_ND.device.type == "cuda" else factors.logits()


def make_step(problem: Problem) -> Callable[[str], None]:
    """A function that runs one forward and backward pass with the named method."""
    torch.manual_seed(0)
    student, teacher = random_logits(problem, trained=True), random_logits(problem, trained=False)
    labels = torch.randint(problem.vocabulary, (problem.tokens,), device=problem.device)
    for tensor in student[:2]:
        tensor.grad = torch.ones_like(tensor)

    def step(method: str) -> None:
        bf16 = problem.precision == "bfloat16"
        with torch.autocast(problem.device, torch.bfloat16, enabled=bf16):
            if method == "full":
                with torch.no_grad(), torch.autocast(problem.device, enabled=False):
                    teacher_logits = all_logits(teacher)
                sums = LOSS.sums(all_logits(student), teacher_logits, labels)
            else:
                sums = chunked.sum_in_chunks(LOSS.sums, student, teacher, (labels,), loss=LOSS)
            loss = sums[0] / problem.tokens
        loss.backward()

    return step


# ---- memory


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def peak_on_cpu(method: str, problem: Problem) -> float:
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


def peak_on_gpu(step: Callable[[str], None], method: str) -> float:
    """Peak MB of one step beyond what was allocated before."""
    step(method)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(method)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peaks(problem: Problem, step: Callable[[str], None]) -> list[float]:
    """Peak MB of each method."""
    if problem.device == "cuda":
        return [peak_on_gpu(step, method) for method in METHODS]
    command = [sys.executable, __file__, "memory"]
    cells = [str(value) for value in problem]
    return [
        float(subprocess.check_output([*command, method, *cells], text=True)) for method in METHODS
    ]


# ---- time


def timed(step: Callable[[str], None], method: str, device: str) -> float:
    """Seconds of one step."""
    if device == "cpu":
        began = time.process_time()
        step(method)
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    step(method)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(step: Callable[[str], None], device: str, rounds: int) -> list[float]:
    """Of each method; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds + 1):
        for method, times in seconds.items():
            times.append(timed(step, method, device))
    return [statistics.median(times[1:]) for times in seconds.values()]


def measure(problem: Problem, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds, and peak MB, of each method."""
    step = make_step(problem)
    megabytes = peaks(problem, step)
    return median_seconds(step, problem.device, rounds), megabytes


def row(problem: Problem, rounds: int) -> str:
    (full_s, chunked_s), (full_mb, chunked_mb) = measure(problem, rounds)
    times = f"{full_s:.4f} | {chunked_s:.4f} | {chunked_s / full_s:.2f}"
    memory = f"{full_mb:,.0f} | {chunked_mb:,.0f} | {chunked_mb / full_mb:.3f}"
    return f"| {' | '.join(str(value) for value in problem[:4])} | {times} | {memory} |"


# ---- gradients in low precision


class Errors(NamedTuple):
    """Errors relative to float64, by the norm."""

    value: float
    hidden: float
    weight: float


def neighbors(noise: float, device: str) -> tuple[FactoredLogits, FactoredLogits]:
    """A student that differs from its teacher by noise, the student in float32 with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 256), (4096, 256))
    base = [torch.randn(*shape, generator=generator) * scale for shape, scale in
            zip(shapes, (1.0, 0.25), strict=True)]  # fmt: skip
    moved = [
        tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for tensor in base
    ]
    hidden_ND, weight_VD = (tensor.bfloat16().to(device) for tensor in base)
    teacher = FactoredLogits(hidden_ND, weight_VD, None)
    hidden_ND, weight_VD = (tensor.to(device).requires_grad_() for tensor in moved)
    student = FactoredLogits(hidden_ND, weight_VD, None)
    return student, teacher


def exact(student: FactoredLogits, teacher: FactoredLogits) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) and its gradients, by hand in float64 from the rounded factors."""
    hidden_ND, weight_VD = (tensor.detach().bfloat16().double().cpu() for tensor in student[:2])
    log_q = (hidden_ND @ weight_VD.T).log_softmax(-1)
    log_p = (teacher.hidden_ND.double().cpu() @ teacher.weight_VD.double().cpu().T).log_softmax(-1)
    slope_NV = log_q.exp() - log_p.exp()
    value = (log_p.exp() * (log_p - log_q)).sum()
    return value, slope_NV @ weight_VD, slope_NV.T @ hidden_ND


def product_errors(noise: float, device: str) -> Iterator[tuple[str, float, Errors]]:
    """Of `linear` and `chunked`: name, true nats a token, errors."""
    loss = FusedLoss(alpha=0.0, temperature=1.0, divergence="forward_kl")
    for name in ("linear", "chunked"):
        student, teacher = neighbors(noise, device)
        labels = torch.zeros(len(student.hidden_ND), dtype=torch.long, device=device)
        with torch.autocast(device, torch.bfloat16):
            if name == "linear":
                rounded = F.linear(*teacher).float()
                sums = loss.sums(F.linear(*student).float(), rounded, labels)
            else:
                sums = chunked.sum_in_chunks(loss.sums, student, teacher, (labels,), loss=loss)
        gradients = torch.autograd.grad(sums[0], student[:2])
        rights = exact(student, teacher)
        errors = [
            ((value.double().cpu() - right).norm() / right.norm()).item()
            for value, right in zip((sums[0].detach(), *gradients), rights, strict=True)
        ]
        yield name, rights[0].item() / len(labels), Errors(*errors)


def print_errors(device: str) -> None:
    print("\n| product | KL, nats a token | value | gradient of hidden states | of the head |")
    print("|---|---:|---:|---:|---:|")
    for noise in (0.0123, 0.0401):
        for name, nats, errors in product_errors(noise, device):
            cells = " | ".join(f"{error:.2%}" for error in errors)
            print(f"| {name} | {nats:.4f} | {cells} |")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        method, tokens, vocabulary, width, precision, device = sys.argv[2:]
        sizes = (int(tokens), int(vocabulary), int(width))
        print(peak_on_cpu(method, Problem(*sizes, precision, device)))
        return
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    device = given.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    options = DEFAULTS[device] | given
    print(f"| {TITLES} | full, MB | chunked, MB | ratio |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for vocabulary in options["vocabulary"].split(","):
        for tokens in options["tokens"].split(","):
            for precision in options["precisions"].split(","):
                sizes = (int(tokens), int(vocabulary), int(options["width"]))
                problem = Problem(*sizes, precision, device)
                print(row(problem, int(options["rounds"])), flush=True)
    print_errors(device)


if __name__ == "__main__":
    main()
