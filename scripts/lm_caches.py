"""What each way of keeping a language model teacher's outputs takes and gives: bytes, seconds, and the angle of its gradient.

    python scripts/lm_caches.py [recipe=gpt2_half] [tokens=12,25,50] [batches=8] [steps=0,200,1000] [key=value ...]

The angle is that between the gradient of the recipe's loss with the whole divergence and with what is kept of it, over all parameters of
the student and one batch; mean and largest of `batches`. `loss.alpha=0` leaves the divergence alone. `steps`: after so many of training
on the whole divergence, for a student that is near its teacher leaves less to measure. Seconds are about 0 where the store has it.
"""

import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measured import composed, conditions, options, prepared, table

from distill import data, student, teacher
from distill.module import Distillation
from distill.recipe import config
from distill.training.loggers import Tracker


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    own, changes = options({"tokens": "12,25,50", "steps": "0,200,1000", "batches": 8})
    with tempfile.TemporaryDirectory() as folder:
        run = composed({"recipe": "gpt2_half", "teacher.dtype": "float32"} | changes)
        show(run, Path(folder), numbers(own["tokens"]), numbers(own["steps"]), own["batches"])
    print(f"\n{conditions()}")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def show(run: config.Run, folder: Path, tokens: list[int], steps: list[int], batches: int) -> None:
    task, tokenizer, examples = prepared(run)
    tutor = teacher.obtain(run, task, tokenizer, examples, folder, Tracker(run, folder))
    learner, classes = student.build_student(run, task, tokenizer, tutor)
    ways = [
        ("hidden", 50),
        *(("sampled", count) for count in tokens),
        *(("top_k", count) for count in tokens[:1]),
    ]
    kept = [
        cached(run, way, count, examples["train"], task, tokenizer, tutor) for way, count in ways
    ]
    angles: list[list[str]] = [[] for _ in kept]
    done = 0
    for step in steps:
        train(run, learner, tutor, task, examples["train"], tokenizer, step - done, classes)
        done = step
        for shown, (split, *_) in zip(angles, kept, strict=True):
            shown.append(angle(run, learner, tutor, task, split, tokenizer, batches, classes))
    rows = []
    for (way, count), (_, size, seconds), shown in zip(ways, kept, angles, strict=True):
        name = way if way == "hidden" else f"{way}, tokens={count}"
        rows.append([name, f"{size:.1f}", f"{seconds:.1f}", *shown])
    print(
        table(
            [
                "outputs",
                "bytes a token",
                "seconds",
                *(f"angle after {step} steps" for step in steps),
            ],
            rows,
        )
    )


def cached(
    run: config.Run, way: str, count: int, split: Any, task: Any, tokenizer: Any, tutor: Any
) -> tuple[Any, float, float]:
    """The examples with such outputs, bytes of these for each predicted token, and the seconds that it took."""
    assert run.teacher is not None
    changed = replace(run, teacher=replace(run.teacher, outputs=way, tokens=count))
    began = time.perf_counter()
    taught = teacher.with_outputs(changed, tutor, split, task, tokenizer)
    seconds = time.perf_counter() - began
    columns = [name for name in taught.column_names if name not in split.column_names]
    size = taught.select_columns(columns).with_format("arrow")[:].nbytes
    return taught, size / sum(split["rows"]), seconds


def module_of(
    run: config.Run, learner: Any, answering: Any, task: Any, classes: int | None
) -> Distillation:
    return Distillation(task, learner, answering, run.loss, run.optimizer, 1, classes)


def gradient(module: Distillation, batch: Any) -> torch.Tensor:
    module.eval()
    module.zero_grad()
    module.parts(batch)["loss"].backward()
    return torch.cat(
        [
            parameter.grad.flatten()
            for parameter in module.student.parameters()
            if parameter.grad is not None
        ]
    )


def angle(
    run: config.Run,
    learner: Any,
    tutor: Any,
    task: Any,
    split: Any,
    tokenizer: Any,
    batches: int,
    classes: int | None,
) -> str:
    """Degrees, mean and largest of some batches."""
    module = module_of(run, learner, tutor, task, classes)
    heads = module_of(run, learner, tutor.get_output_embeddings(), task, classes)
    found = []
    for _, batch in zip(
        range(batches),
        data.make_loader(split, task, tokenizer.pad_token_id, run.data.batch_size, seed=1),
        strict=False,
    ):
        whole, kept = gradient(module, batch._replace(teacher=None)), gradient(heads, batch)
        found.append(
            math.degrees(
                math.acos(
                    min(1, torch.cosine_similarity(whole.double(), kept.double(), dim=0).item())
                )
            )
        )
    return f"{sum(found) / len(found):.2f}° (at most {max(found):.2f}°)"


def train(
    run: config.Run,
    learner: Any,
    tutor: Any,
    task: Any,
    split: Any,
    tokenizer: Any,
    steps: int,
    classes: int | None,
) -> None:
    """Some plain steps on the whole divergence."""
    module = module_of(run, learner, tutor, task, classes).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=run.optimizer.lr)
    batches = data.make_loader(split, task, tokenizer.pad_token_id, run.data.batch_size, seed=2)
    done = 0
    while done < steps:
        for _, batch in zip(range(steps - done), batches, strict=False):
            optimizer.zero_grad()
            module.parts(batch)["loss"].backward()
            optimizer.step()
            done += 1


if __name__ == "__main__":
    main()
