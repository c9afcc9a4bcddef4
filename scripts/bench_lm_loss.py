"""A language model's loss and gradients from its last hidden states: all logits at once against some at a time.

    python scripts/bench_lm_loss.py [tokens=1024,4096] [vocabulary=50257,128256] [width=768] [precisions=float32,bfloat16] [rounds=5]

alpha * CE + (1 - alpha) * T^2 * KL(teacher || student) with heads of that width for both, forward and backward. Times are medians of
rounds in which the two take turns, in one process: seconds of its one thread, whatever else the machine does. Memory is the most of a
process of its own, beyond what it had with hidden states, heads and a gradient of the student's head in place; a head's worth of what is
left is the new gradient, which both need.
bfloat16: the student under autocast, and a teacher in bfloat16.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

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
WAYS = ("whole", "chunked")
DAMPED = 0.02  # spread of the numbers in a head


def sums(student_NC: Tensor, teacher_NC: Tensor, labels: Tensor) -> Tensor:
    supervised_N = losses.cross_entropy(student_NC, labels)
    divergence_N = losses.forward_kl(student_NC, teacher_NC, 2.0)
    return torch.stack(
        [
            losses.distillation(supervised_N, divergence_N, 0.5).sum(),
            supervised_N.sum(),
            divergence_N.sum(),
        ]
    )


def steps(tokens: int, vocabulary: int, width: int, precision: str) -> Callable[[str], None]:
    """One forward and backward, in the way that is named."""
    torch.manual_seed(0)
    low = precision == "bfloat16"
    student = FactoredLogits(
        torch.randn(tokens, width).requires_grad_(),
        torch.randn(vocabulary, width).mul_(DAMPED).requires_grad_(),
        None,
    )
    teacher = FactoredLogits(
        torch.randn(tokens, width), torch.randn(vocabulary, width).mul_(DAMPED), None
    )
    if low:
        teacher = FactoredLogits(teacher.hidden_ND.bfloat16(), teacher.weight_VD.bfloat16(), None)
    labels = torch.randint(vocabulary, (tokens,))
    for tensor in student[:2]:
        tensor.grad = torch.ones_like(tensor)

    def step(way: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            given = (
                (student, teacher)
                if way == "chunked"
                else (student.logits(), chunked.teacher_chunk(teacher, slice(None)))
            )
            loss = chunked.sum_in_chunks(sums, *given, (labels,))[0] / tokens
        loss.backward()

    return step


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def memory(way: str, *problem: str) -> float:
    """MB beyond what was there before the step, looked at every millisecond: a process's own record would count its start too."""
    step = steps(*map(int, problem[:3]), problem[3])
    before, most, over = resident(), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.001):
            most = max(most, resident())

    looker = threading.Thread(target=look)
    looker.start()
    step(way)
    over.set()
    looker.join()
    return (most - before) / 1e6


def row(problem: list[str], rounds: int) -> str:
    extra = [
        float(
            subprocess.check_output([sys.executable, __file__, "memory", way, *problem], text=True)
        )
        for way in WAYS
    ]
    step = steps(*map(int, problem[:3]), problem[3])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, taken in seconds.items():
            began = time.process_time()
            step(way)
            taken.append(time.process_time() - began)
    whole, parts = (statistics.median(taken[1:]) for taken in seconds.values())
    tokens, vocabulary, width, precision = problem
    times = f"{whole:.2f} | {parts:.2f} | {parts / whole:.2f}"
    return f"| {tokens} | {vocabulary} | {width} | {precision} | {times} | {extra[0]:,.0f} | {extra[1]:,.0f} | {extra[1] / extra[0]:.3f} |"


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        print(memory(*sys.argv[2:]))
        return
    given = {**DEFAULTS, **dict(argument.split("=", 1) for argument in sys.argv[1:])}
    print(
        "| tokens | vocabulary | width | precision | whole, s | chunked, s | ratio | whole, MB | chunked, MB | ratio |"
    )
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for vocabulary in given["vocabulary"].split(","):
        for tokens in given["tokens"].split(","):
            for precision in given["precisions"].split(","):
                print(
                    row([tokens, vocabulary, given["width"], precision], int(given["rounds"])),
                    flush=True,
                )


if __name__ == "__main__":
    main()
