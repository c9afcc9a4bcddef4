"""Time and memory per example as the corpus grows: data preparation, teacher cache and training.

    python scripts/bench_growth.py [sizes=1000,10000,100000] [key=value ...]

Generated sentences of 4 to 40 words in CSV files, a random BERT of two layers as the teacher, one
of its layers as the student, one epoch. Each size runs in its own process with an empty store.
Seconds are process time of one thread. Memory is sampled every 10 ms: the peak of RssAnon (private
memory) and the peak of RssFile (pages of mapped files, which the kernel reclaims when memory is
short).
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
STAGES = ["data", "cache", "training"]
CONSTANT = 500  # examples of the validation and test splits
WORDS = 2000


def write_corpus(folder: Path, size: int) -> None:
    """CSV splits of sentences whose first word determines their label."""
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
                rest = " ".join(rng.choices(words, k=rng.randint(3, 39)))
                file.write(f"{words[label]} {rest},topic {label}\n")


def resident_bytes() -> tuple[int, int]:
    """Private memory of the process, and its pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, files


def measure(work: Callable[[], Any]) -> tuple[Any, float, int, int]:
    """Result, seconds, and the peaks of both kinds of memory."""
    peaks, finished = resident_bytes(), threading.Event()

    def sample() -> None:
        nonlocal peaks
        while not finished.wait(0.01):
            peaks = tuple(map(max, peaks, resident_bytes()))  # type: ignore[assignment]

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.process_time()
    result = work()
    seconds = time.process_time() - began
    finished.set()
    sampler.join()
    return result, seconds, *peaks


def stages(folder: Path, changes: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """Name, seconds and peaks of private and file memory of each stage."""
    import torch
    from benchmark import compose_run

    from distill import student, teacher
    from distill.prepare import prepare_run
    from distill.training.loggers import Tracker

    torch.set_num_threads(1)

    config = {f"teacher.config.{key}": value for key, value in TINY.items()}
    run = compose_run({"data.source": str(folder / "corpus")} | config | RECIPE | changes)
    made, *costs = measure(lambda: prepare_run(run))
    yield "data", *costs
    tracker = Tracker(run, folder)
    model = teacher.obtain(run, made, folder, tracker)
    examples, *costs = measure(lambda: teacher.with_outputs(run, made, model).examples["train"])
    yield "cache", *costs
    made.examples["train"] = examples
    _, *costs = measure(lambda: student.train_student(run, made, model, [], folder, tracker))
    yield "training", *costs


def main() -> None:
    changes = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "folder" in changes:
        print(json.dumps([list(costs) for costs in stages(Path(changes.pop("folder")), changes)]))
        return
    from benchmark import conditions, table

    rows = []
    for size in map(int, changes.pop("sizes", "1000,10000,100000").split(",")):
        for stage, seconds, anonymous, files in measure_size(size, changes):
            row = [stage, f"{size:,}", f"{1e3 * seconds / size:.3f}"]
            rows.append([*row, f"{anonymous / 1e6:.0f}", f"{files / 1e6:.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: STAGES.index(row[0]))
    titles = ["stage", "examples", "ms an example", "private memory, MB", "mapped files, MB"]
    print(table(titles, rows))
    print(f"\n{conditions()}")


def measure_size(size: int, changes: dict[str, str]) -> list[tuple[str, float, int, int]]:
    """All stages for one corpus size, in a new process with an empty store."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "corpus").mkdir()
        write_corpus(Path(name) / "corpus", size)
        keys = [f"{key}={value}" for key, value in changes.items()]
        output = subprocess.check_output(
            [sys.executable, __file__, f"folder={name}", *keys],
            text=True,
            env=os.environ | {"DISTILL_CACHE": f"{name}/store"},
        )
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
