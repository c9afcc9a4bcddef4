"""Does a larger corpus cost more for each example, in time or memory? Data, cache and training at several sizes.

    python scripts/bench_growth.py [sizes=1000,10000,100000] [key=value ...]

Made-up sentences of 4 to 40 words in CSV files, a random BERT of two layers as the teacher and one of them as the student, one epoch;
each size in a process of its own, with an empty store. Seconds are those of the process's one thread. Memory is the most of RssAnon,
looked at every 10 ms: what a process holds for itself. Pages of files that are mapped into memory come on top, but the system takes them
back when it needs room; the most of these is in the last column.
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
CONSTANT = 500  # examples of the validation and test splits
WORDS = 2000


def corpus(folder: Path, size: int) -> None:
    """Sentences whose first word tells their label."""
    drawn = random.Random(0)
    words = [
        "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9)))
        for _ in range(WORDS)
    ]
    for split, count in (("train", size), ("validation", CONSTANT), ("test", CONSTANT)):
        with (folder / f"{split}.csv").open("w") as file:
            file.write("text,label\n")
            for _ in range(count):
                label = drawn.randrange(4)
                file.write(
                    f"{words[label]} {' '.join(drawn.choices(words, k=drawn.randint(3, 39)))},topic {label}\n"
                )


def resident() -> tuple[int, int]:
    """Bytes of the process's own memory, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, files


def watched(work: Callable[[], Any]) -> tuple[Any, float, int, int]:
    """What it answers, its seconds, and the most of both kinds of memory meanwhile."""
    most, over = resident(), threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = tuple(map(max, most, resident()))  # type: ignore[assignment]

    looker = threading.Thread(target=look)
    looker.start()
    began = time.process_time()
    answer = work()
    seconds = time.process_time() - began
    over.set()
    looker.join()
    return answer, seconds, *most


def stages(
    size: int, folder: Path, changes: dict[str, str]
) -> Iterator[tuple[str, float, int, int]]:
    """Name, seconds and memory of each stage."""
    import torch
    from measured import composed, prepared

    from distill import student, teacher
    from distill.training.loggers import Tracker

    torch.set_num_threads(1)

    given = {f"teacher.config.{key}": value for key, value in TINY.items()} | RECIPE | changes
    run = composed({"data.source": str(folder / "corpus"), **given})
    made, *told = watched(lambda: prepared(run))
    yield "data", *told
    tracker = Tracker(run, folder)
    tutor = teacher.obtain(run, made.task, made.tokenizer, made.examples, folder, tracker)
    taught, *told = watched(
        lambda: teacher.with_outputs(run, tutor, made.examples["train"], made.task, made.tokenizer)
    )
    yield "cache", *told
    made.examples["train"] = taught
    _, *told = watched(
        lambda: student.distil(
            run, made.task, made.tokenizer, made.examples, tutor, [], folder, tracker
        )
    )
    yield "training", *told


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "size" in given:
        size, folder = int(given.pop("size")), Path(given.pop("folder"))
        print(json.dumps([list(told) for told in stages(size, folder, given)]))
        return
    from measured import conditions, table

    sizes = [int(size) for size in given.pop("sizes", "1000,10000,100000").split(",")]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "corpus").mkdir()
            corpus(Path(name) / "corpus", size)
            command = [
                sys.executable,
                __file__,
                f"size={size}",
                f"folder={name}",
                *(f"{key}={value}" for key, value in given.items()),
            ]
            answer = subprocess.check_output(
                command, text=True, env=os.environ | {"DISTILL_CACHE": f"{name}/store"}
            )
        for stage, seconds, anonymous, files in json.loads(answer.splitlines()[-1]):
            rows.append(
                [
                    stage,
                    f"{size:,}",
                    f"{1e3 * seconds / size:.3f}",
                    f"{anonymous / 1e6:.0f}",
                    f"{files / 1e6:.0f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: ["data", "cache", "training"].index(row[0]))
    print(table(["stage", "examples", "ms an example", "own memory, MB", "mapped files, MB"], rows))
    print(f"\n{conditions()}")


if __name__ == "__main__":
    main()
