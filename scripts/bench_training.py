"""What a training step costs: with a cached teacher, an online one and none, in our trainer and in a bare loop of the same mathematics.

    python scripts/bench_training.py [recipe=bert_to_distil] [steps=25] [rounds=5] [compile=0] [key=value ...]

All ways run in one process and take turns, each for so many optimizer steps after a few that do not count; the ratios are of medians.
Ours is the student stage itself, logging, callbacks, metrics.csv and a drawn progress bar included; looks at the validation split and
checkpoints are not. The bare loop has the same batches from the same loader and freed memory is kept for it too. Plain fine-tuning learns
from the labels that the recipe hides. Filling the cache is compared with one forward over the same batches, which were made beforehand.
Seconds are those of the process's one thread on a CPU, wall time on a GPU, where peak memory and model FLOPs utilisation
(peak=TFLOPS of the device, for bf16) are shown as well. `compile=1` adds trainer.compile, with what compiling costs.
"""

import os
import pty
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from measured import Prepared, composed, conditions, options, prepared, seconds, table, turns
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import get_scheduler

from distill import data, models, student, teacher
from distill.recipe import config
from distill.training import loop, performance
from distill.training.loggers import Tracker

WARM = 3  # steps that do not count


class Timed(L.Callback):
    """Seconds of the steps after the warm ones, and of those where there are."""

    def __init__(self, steps: int, device: str) -> None:
        self.last, self.device = WARM + steps, device
        self.began = self.start = self.taken = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.began = seconds(self.device)
        if trainer.global_step == WARM and not self.start:
            self.start = seconds(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.last:
            self.taken = seconds(self.device) - self.start


class Bench:
    """The models and examples that all ways share."""

    def __init__(self, run: config.Run, folder: Path, steps: int, device: str) -> None:
        self.run, self.folder, self.steps, self.device = run, folder, steps, device
        self.made = prepared(run)
        self.labelled = prepared(replace(run, data=replace(run.data, labelled=None)))
        self.tracker = Tracker(run, folder)
        self.tutor = teacher.obtain(
            run, self.made.task, self.made.tokenizer, self.made.examples, folder, self.tracker
        )
        self.taught = teacher.with_outputs(
            run, self.tutor, self.made.examples["train"], self.made.task, self.made.tokenizer
        )
        self.numbers = count()
        self.warmed: dict[str, float] = {}

    def of(self, run: config.Run, made: Prepared, train: Any, name: str) -> float:
        """Seconds per example of our student stage."""
        steps = WARM + self.steps
        run = replace(
            run, trainer=replace(run.trainer, max_steps=steps, validations=1, progress=True)
        )
        timed = Timed(self.steps, self.device)
        with tempfile.TemporaryDirectory(dir=self.folder) as inside, on_a_terminal():
            examples = type(made.examples)(made.examples | {"train": train})
            tutor = None if self.tutor is None else self.tutor.float()
            student.distil(
                run,
                made.task,
                made.tokenizer,
                examples,
                tutor,
                [timed],
                Path(inside),
                Tracker(run, Path(inside)),
            )
        self.warmed[name] = timed.start - timed.began
        return timed.taken / self.steps / run.data.batch_size

    def cached(self, **changes: Any) -> float:
        run = replace(self.run, trainer=replace(self.run.trainer, **changes))
        return self.of(run, self.made, self.taught, "compiled" if changes else "cached")

    def online(self) -> float:
        run = replace(self.run, teacher=replace(self.run.teacher, outputs="online"))
        return self.of(run, self.made, self.made.examples["train"], "online")

    def plain(self) -> float:
        run = replace(self.run, loss=replace(self.run.loss, alpha=1.0))
        return self.of(run, self.labelled, self.labelled.examples["train"], "plain")

    def bare(self) -> float:
        """The same steps with nothing but PyTorch around them, as it is by itself: not held to the same bits in every run."""
        torch.use_deterministic_algorithms(False)
        run, steps = self.run, WARM + self.steps
        assert self.tutor is not None
        learner, _ = student.build_student(
            run, self.made.task, self.made.tokenizer, self.tutor.float()
        )
        learner.to(self.device).train()
        train, _ = loop.make_loaders(
            run,
            self.taught,
            self.made.examples["validation"],
            self.made.task,
            self.made.tokenizer.pad_token_id,
        )
        decayed = [parameter for parameter in learner.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in learner.parameters() if parameter.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": run.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=run.optimizer.lr, fused=True)
        schedule = get_scheduler(
            run.optimizer.schedule, optimizer, round(run.optimizer.warmup * steps), steps
        )
        with performance.keep_freed_memory():
            for number, batch in enumerate(islice(epochs(train), steps)):
                if number == WARM:
                    start = seconds(self.device)
                batch = move_data_to_device(batch, self.device)
                with torch.autocast(
                    self.device, torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"
                ):
                    loss = self._loss(models.logits(learner, batch.inputs), batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(
                    learner.parameters(), run.optimizer.clip or float("inf")
                )
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            return (seconds(self.device) - start) / self.steps / run.data.batch_size

    def _loss(self, answers: torch.Tensor, batch: Any) -> torch.Tensor:
        """alpha * CE + (1 - alpha) * T^2 * KL, each a mean over the batch, unlabelled examples counting as 0."""
        alpha, temperature = self.run.loss.alpha, self.run.loss.temperature
        told = [
            F.log_softmax(logits.float() / temperature, -1) for logits in (answers, batch.teacher)
        ]
        divergence = F.kl_div(*told, log_target=True, reduction="sum")
        supervised = F.cross_entropy(
            answers.float(), batch.labels, reduction="sum", ignore_index=-100
        )
        return (alpha * supervised + (1 - alpha) * temperature**2 * divergence) / batch.rows

    def filled(self) -> float:
        """Seconds per example of filling the cache."""
        before = os.environ.get("DISTILL_CACHE")
        with tempfile.TemporaryDirectory(dir=self.folder) as store:
            os.environ["DISTILL_CACHE"] = store
            start = seconds(self.device)
            teacher.with_outputs(
                self.run,
                self.tutor,
                self.made.examples["train"],
                self.made.task,
                self.made.tokenizer,
            )
            taken = seconds(self.device) - start
        os.environ.pop("DISTILL_CACHE") if before is None else os.environ.update(
            DISTILL_CACHE=before
        )
        return taken / len(self.made.examples["train"])

    @torch.inference_mode()
    def forward(self) -> float:
        """Seconds per example of the teacher's forward alone."""
        assert self.tutor is not None
        tutor = teacher.answering(self.run, self.tutor).to(self.device)
        train, pad_id = self.made.examples["train"], self.made.tokenizer.pad_token_id
        batches = [
            move_data_to_device(batch, self.device)
            for batch in data.make_loader(
                train, self.made.task, pad_id, self.run.evaluate.batch_size
            )
        ]
        with performance.keep_freed_memory():
            start = seconds(self.device)
            for batch in batches:
                models.logits(tutor, batch.inputs).float()
            return (seconds(self.device) - start) / len(train)

    def flops(self) -> list[int]:
        """Operations of a forward for one example, of student and teacher."""
        learner, _ = student.build_student(
            self.run, self.made.task, self.made.tokenizer, self.tutor
        )
        batch = next(
            iter(data.make_loader(self.taught, self.made.task, self.made.tokenizer.pad_token_id, 1))
        )
        found = []
        for model in (learner, self.tutor):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                models.logits(model.float(), batch.inputs)  # type: ignore[union-attr]
            found.append(counter.get_total_flops())
        return found


def epochs(train: Any) -> Iterator[Any]:
    return chain.from_iterable(
        train for _ in iter(lambda: train.plan.set_epoch(train.plan.epoch + 1), 0)
    )


@contextmanager
def on_a_terminal() -> Iterator[None]:
    """What is printed goes to a terminal that nobody looks at: progress bars are drawn."""
    ours, theirs = pty.openpty()
    reader = threading.Thread(target=_drained, args=(ours,), daemon=True)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, redirect_stdout(terminal):
        yield


def _drained(terminal: int) -> None:
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:  # its other end is closed
        os.close(terminal)


def main() -> None:
    own, changes = options({"steps": 25, "rounds": 5, "compile": 0, "peak": 0.0})
    run = composed(changes)
    if run.trainer.accumulate > 1:
        sys.exit("trainer.accumulate must be 1 here: the bare loop takes whole batches")
    device = models.resolve_device(run)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(run, Path(folder), own["steps"], device)
        ways: dict[str, Any] = {
            "plain": bench.plain,
            "cached": bench.cached,
            "online": bench.online,
            "bare": bench.bare,
        }
        ways |= {"forward": bench.forward, "filled": bench.filled}
        if own["compile"]:
            ways["compiled"] = lambda: bench.cached(compile=True)
        peaks: dict[str, float] = {}
        found = turns(
            {name: remembered(name, way, peaks, device) for name, way in ways.items()},
            own["rounds"],
        )
        ours, theirs = bench.flops()
        show(bench, found, peaks, 1 + theirs / (3 * ours), 3 * ours, own)


def remembered(name: str, way: Any, peaks: dict[str, float], device: str) -> Any:
    """The same way, its peak of the GPU's memory noted."""

    def done() -> float:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = way()
        if device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / 1e6
        return taken

    return done


def show(
    bench: Bench,
    found: dict[str, float],
    peaks: dict[str, float],
    bound: float,
    step: int,
    own: dict[str, Any],
) -> None:
    goals = [
        ("plain fine-tuning", "plain", "plain", ""),
        ("cached teacher", "cached", "plain", "<= 1.02"),
        ("online teacher", "online", "plain", f"<= {bound:.2f} = 1 + F_T / (3 F_S)"),
        ("bare PyTorch loop, cached teacher", "bare", "bare", ""),
        ("ours, cached teacher", "cached", "bare", "<= 1.03"),
        ("ours, trainer.compile", "compiled", "cached", ""),
        ("teacher's forward alone", "forward", "forward", ""),
        ("filling the cache", "filled", "forward", "1"),
    ]
    extra = ["peak memory, MB", "model FLOPs utilisation"] if peaks else []
    rows = []
    for title, name, against, goal in goals:
        if name in found:
            cells = [title, f"{1e3 * found[name]:.2f}", f"{found[name] / found[against]:.3f}", goal]
            used = (
                f"{step / found[name] / own['peak'] / 1e12:.1%}"
                if own["peak"] and name not in ("forward", "filled")
                else ""
            )
            rows.append([*cells, *([f"{peaks[name]:.0f}", used] if peaks else [])])
    print(table(["", "ms an example", "ratio", "goal", *extra], rows))
    padding = data.make_loader(
        bench.taught, bench.made.task, 0, bench.run.data.batch_size, seed=bench.run.seed
    ).plan.padding()
    print(f"\n{100 * padding:.1f} % of the tokens of an epoch are padding (goal: below 5 %).")
    if "compiled" in found:
        print(
            f"The first {WARM} steps took {bench.warmed['compiled']:.0f} s compiled, {bench.warmed['cached']:.1f} s otherwise."
        )
    in_what = f"{bench.run.trainer.precision}, teacher in {models.resolve_teacher_dtype(bench.run)}"
    print(f"Medians of {own['rounds']} rounds of {own['steps']} steps; {in_what}.\n")
    print(conditions(bench.device))


if __name__ == "__main__":
    main()
