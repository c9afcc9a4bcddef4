"""Time and memory per example as the corpus grows: data preparation, teacher cache and training.

    python scripts/bench_growth.py [sizes=1000,10000,100000] [words=4-40] [only=data] [key=value]

Generated sentences of 4 to 40 words in CSV files, a random BERT of two layers as the teacher, one
of its layers as the student, one epoch. `data` is all before the teacher, `encoding` its part that
tokenizes, and `only=data` stops there. Each size runs in its own process with an empty store. CPU
time is that of all processes. Memory is sampled every 0.1 s, for all processes together: the peak
of private memory and the peak of mapped files, which the kernel reclaims when memory is short.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
RECIPE = {
    "recipe": "tiny",
    "data.batch_size": 32,
    "tokenizer.vocab_size": 400,
    "teacher.finetune": "null",
    "student.layers": "[0]",
    "trainer.epochs": 1,
    "trainer.validations": 1,
}
STAGES = ["data", "encoding", "cache", "training"]
CONSTANT = 500  # examples of the validation and test splits
WORDS = 2000


def write_corpus(folder: Path, size: int, lengths: str) -> None:
    """CSV splits of sentences whose first word determines their label."""
    least, most = (int(text) - 1 for text in lengths.split("-"))
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(WORDS)
    ]
    for split, count in (("train", size), ("validation", CONSTANT), ("test", CONSTANT)):
        with (folder / f"{split}.csv").open("w") as file:
            file.write("text,label\n")
            for _ in range(count):
                label = rng.randrange(4)
                rest = " ".join(rng.choices(words, k=rng.randint(least, most)))
                file.write(f"{words[label]} {rest},topic {label}\n")


def resident_bytes() -> tuple[int, int]:
    """Private memory of this process and its children, and their pages of mapped files."""
    processes = ["self"]
    for file in Path("/proc/self/task").glob("*/children"):
        processes += file.read_text().split()
    sums = [0, 0]
    for process in processes:
        with suppress(OSError):  # it has ended
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            sizes = dict(line.split(":", 1) for line in text.splitlines()[1:])
            for index, name in enumerate(("Pss_Anon", "Pss_File")):
                sums[index] += 1024 * int(sizes[name].split()[0])
    return sums[0], sums[1]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(work: Callable[[], Any]) -> tuple[Any, float, float, int, int]:
    """Result, CPU seconds, seconds, and the peaks of both kinds of memory."""
    peaks, finished = resident_bytes(), threading.Event()

    def sample() -> None:
        nonlocal peaks
        while not finished.wait(0.1):
            peaks = tuple(map(max, peaks, resident_bytes()))  # type: ignore[assignment]

    sampler = threading.Thread(target=sample)
    sampler.start()
    began, start = cpu_seconds(), time.perf_counter()
    result = work()
    seconds, wall = cpu_seconds() - began, time.perf_counter() - start
    finished.set()
    sampler.join()
    return result, seconds, wall, *peaks


def stages(folder: Path, only: str, changes: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """Name, CPU seconds, seconds, peaks of private and of file memory of each stage."""
    import torch
    from benchmark import compose_run

    from distill import data, student, teacher
    from distill.prepare import prepare_run
    from distill.training.loggers import Tracker

    torch.set_num_threads(1)

    config = {f"teacher.config.{key}": value for key, value in TINY.items()}
    run = compose_run({"data.source": str(folder / "corpus")} | config | RECIPE | changes)
    made, *costs = measure(lambda: prepare_run(run))
    yield "data", *costs
    os.environ["DISTILL_CACHE"] += "/again"
    _, *costs = measure(lambda: data.encode(made.raw, made.task, made.tokenizer, run.data))
    yield "encoding", *costs
    if only == "data":
        return
    tracker = Tracker(run, folder)
    model = teacher.obtain(run, made, folder, tracker)
    examples, *costs = measure(lambda: teacher.with_outputs(run, made, model).examples["train"])
    yield "cache", *costs
    made.examples["train"] = examples
    _, *costs = measure(lambda: student.train_student(run, made, model, [], folder, tracker))
    yield "training", *costs


def main() -> None:
    changes = dict(argument.split("=", 1) for argument in sys.argv[1:])
    only, words = changes.pop("only", ""), changes.pop("words", "4-40")
    if "folder" in changes:
        folder = Path(changes.pop("folder"))
        print(json.dumps([list(costs) for costs in stages(folder, only, changes)]))
        return
    from benchmark import conditions, table

    rows = []
    for size in map(int, changes.pop("sizes", "1000,10000,100000").split(",")):
        for stage, seconds, wall, anonymous, files in measure_size(size, words, only, changes):
            row = [stage, f"{size:,}", f"{1e6 * seconds / size:.1f}", f"{wall:.1f}"]
            rows.append([*row, f"{anonymous / 1e6:.0f}", f"{files / 1e6:.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: STAGES.index(row[0]))
    first = {row[0]: row for row in reversed(rows)}
    for row in rows:  # 1.0: linear growth
        row.insert(3, f"{float(row[2]) / float(first[row[0]][2]):.2f}")
    titles = [
        "stage",
        "examples",
        "CPU time an example, us",
        "against the first size",
        "seconds",
        "private memory, MB",
        "mapped files, MB",
    ]
    print(table(titles, rows))
    print(f"\n{conditions()}")


def measure_size(
    size: int, words: str, only: str, changes: dict[str, str]
) -> list[tuple[str, float, float, int, int]]:
    """All stages for one corpus size, in a new process with an empty store."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "corpus").mkdir()
        write_corpus(Path(name) / "corpus", size, words)
        keys = [f"{key}={value}" for key, value in changes.items()]
        output = subprocess.check_output(
            [sys.executable, __file__, f"folder={name}", f"only={only}", *keys],
            text=True,
            env=os.environ | {"DISTILL_CACHE": f"{name}/store"},
        )
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
