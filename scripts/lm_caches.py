"""Size, time and gradient error of each form in which a language model teacher's outputs are
cached.

    python scripts/lm_caches.py [recipe=gpt2_half] [tokens=12,25,50] [batches=8] [steps=0,200,1000]
                                [key=value ...]

The gradient error is the angle between the gradients of the recipe's loss with the full divergence
and with the cached outputs, over all parameters of the student and one batch; mean and maximum of
`batches`. `loss.alpha=0` leaves the divergence alone. `steps`: number of training steps on the full
divergence before measuring, because the angle depends on how close the student is to its teacher.
Seconds are about 0 where the store has the outputs already.
"""

import logging
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark import compose_run, conditions, options, table

from distill import data, student, teacher
from distill.module import Distillation
from distill.prepare import Prepared, prepare_run
from distill.recipe import config
from distill.training.loggers import Tracker


@dataclass
class Models:
    """A run with its data, its teacher and its student."""

    run: config.Run
    made: Prepared
    teacher: Any
    student: Any
    classes: int | None

    def module(self, teacher: Any) -> Distillation:
        """The training module with this teacher, or with the teacher's head alone."""
        loss, optimizer = self.run.loss, self.run.optimizer
        module = Distillation(self.made.task, self.student, teacher, loss, optimizer, 1)
        module.classes = self.classes
        return module

    def loader(self, split: Any, seed: int) -> Any:
        pad_id = self.made.tokenizer.pad_token_id
        batching = data.Batching(self.run.data.batch_size, seed=seed)
        return data.make_loader(split, self.made.task, pad_id, batching)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    settings, changes = options({"tokens": "12,25,50", "steps": "0,200,1000", "batches": 8})
    tokens, steps = (list(map(int, settings[key].split(","))) for key in ("tokens", "steps"))
    forms = [("hidden", 50), *(("sampled", count) for count in tokens), ("top_k", tokens[0])]
    with tempfile.TemporaryDirectory() as folder:
        run = compose_run({"recipe": "gpt2_half", "teacher.dtype": "float32"} | changes)
        rows = measure(build(run, Path(folder)), forms, steps, settings["batches"])
    angles = (f"angle after {step} steps" for step in steps)
    print(table(["outputs", "bytes a token", "seconds", *angles], rows))
    print(f"\n{conditions()}")


def build(run: config.Run, folder: Path) -> Models:
    made = prepare_run(run)
    model = teacher.obtain(run, made, folder, Tracker(run, folder))
    return Models(run, made, model, *student.build_student(run.student, made, model))


def measure(
    models: Models, forms: list[tuple[str, int]], steps: list[int], batches: int
) -> list[list[str]]:
    """A row of the table for each form: bytes, seconds, and an angle for each number of steps."""
    caches = [fill_cache(models, form, count) for form, count in forms]
    rows = []
    for (form, count), (_, size, seconds) in zip(forms, caches, strict=True):
        name = form if form == "hidden" else f"{form}, tokens={count}"
        rows.append([name, f"{size:.1f}", f"{seconds:.1f}"])
    done = 0
    for step in steps:
        train(models, step - done)
        done = step
        for row, (split, *_) in zip(rows, caches, strict=True):
            row.append(angle(models, split, batches))
    return rows


def fill_cache(models: Models, form: str, count: int) -> tuple[Any, float, float]:
    """The examples with cached outputs, bytes per predicted token, and seconds."""
    run, made = models.run, models.made
    assert run.teacher is not None
    changed = replace(run, teacher=replace(run.teacher, outputs=form, tokens=count))
    split = made.examples["train"]
    began = time.perf_counter()
    cached = teacher.with_outputs(changed, made, models.teacher).examples["train"]
    seconds = time.perf_counter() - began
    columns = [name for name in cached.column_names if name not in split.column_names]
    size = cached.select_columns(columns).with_format("arrow")[:].nbytes
    return cached, size / sum(split["rows"]), seconds


def gradient(module: Distillation, batch: Any) -> torch.Tensor:
    module.eval()
    module.zero_grad()
    module.parts(batch)["loss"].backward()
    gradients = [parameter.grad for parameter in module.student.parameters()]
    return torch.cat([each.flatten() for each in gradients if each is not None])


def angle(models: Models, split: Any, batches: int) -> str:
    """Degrees between both gradients: mean and maximum of some batches."""
    online = models.module(models.teacher)
    cached = models.module(models.teacher.get_output_embeddings())
    angles = []
    for _, batch in zip(range(batches), models.loader(split, seed=1), strict=False):
        exact, approximate = gradient(online, batch._replace(teacher=None)), gradient(cached, batch)
        cosine = torch.cosine_similarity(exact.double(), approximate.double(), dim=0).item()
        angles.append(math.degrees(math.acos(min(1, cosine))))
    return f"{sum(angles) / len(angles):.2f}° (at most {max(angles):.2f}°)"


def train(models: Models, steps: int) -> None:
    """Train the student for some steps on the full divergence."""
    module = models.module(models.teacher).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=models.run.optimizer.lr)
    batches = models.loader(models.made.examples["train"], seed=2)
    done = 0
    while done < steps:
        for _, batch in zip(range(steps - done), batches, strict=False):
            optimizer.zero_grad()
            module.parts(batch)["loss"].backward()
            optimizer.step()
            done += 1


if __name__ == "__main__":
    main()
