"""The student stage of a recipe against Hugging Face's Trainer and torchdistill: same models, examples, epochs and batch size.

    python scripts/bench_peers.py [recipe=bert_to_distil] [rounds=3] [environment=FOLDER] [key=value ...]

Each training is a process of its own, and they take turns. The peers are those of `scripts/peers/`, at their own defaults, but for the
learning rate: accelerate, torchvision and torchdistill are installed into an environment of their own (a temporary one unless a folder is
named), which sees the project's other packages. What is timed is the training: after imports, models and tokens are in memory. Ours is
the whole stage as it runs by itself, with looks at the validation split, checkpoints and the saved student, once with the filling of the
teacher's cache and once without. CPU seconds count what a process computed, whatever else the machine did; with several threads look at
the clock's. Single-label classification only.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from measured import composed, conditions, options, prepared, table

from distill import models, student, teacher
from distill.training.loggers import Tracker

PEERS = Path(__file__).parent / "peers"
PACKAGES = ["accelerate>=1.12", "psutil", "pillow", "torchvision", "torchdistill==1.1.5"]
WAYS = {  # title -> script and its arguments
    "Hugging Face Trainer, its defaults": ["hf_trainer.py", "default"],
    "Hugging Face Trainer, tuned by hand": ["hf_trainer.py", "tuned"],
    "torchdistill, its defaults": ["torchdistill_box.py"],
    "ours": ["ours.py"],
}


def environment(folder: Path) -> Path:
    """The python of an environment with the peers in it, made where it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, symlinks=True)
        inside = next(folder.glob("lib/python*/site-packages"))
        (inside / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            *PACKAGES,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return python


def lay_out(changes: dict[str, Any], folder: Path) -> int:
    """Teacher, untrained student and encoded examples, for every driver alike; returns the examples of all epochs."""
    run = composed(changes)
    made = prepared(run)
    tutor = teacher.obtain(
        run, made.task, made.tokenizer, made.examples, folder, Tracker(run, folder)
    )
    learner, _ = student.build_student(run, made.task, made.tokenizer, tutor)
    for name, model in (("teacher", tutor), ("start", learner)):
        models.save(model, made.tokenizer, folder / name)  # type: ignore[arg-type]
    for name, split in made.examples.items():
        (folder / f"{name}.json").write_text(
            json.dumps(split.select_columns(["input_ids", "labels"]).to_list())
        )
    told = {
        "lr": run.optimizer.lr,
        "epochs": round(run.trainer.epochs),
        "batch_size": run.data.batch_size,
        "seed": run.seed,
    }
    told |= {
        "alpha": run.loss.alpha,
        "temperature": run.loss.temperature,
        "pad_id": made.tokenizer.pad_token_id,
    }
    (folder / "job.json").write_text(json.dumps(told))
    return told["epochs"] * len(made.examples["train"])


def trained(python: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """What a driver answers."""
    command = [python, str(PEERS / arguments[0]), str(folder), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    own, changes = options({"rounds": 3, "environment": ""})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DISTILL_CACHE"] = str(folder / "store")
        python = str(environment(Path(own["environment"] or folder / "environment")))
        examples = lay_out(changes, folder)
        WAYS["ours"] += [
            f"{key}={value}" for key, value in ({"tracking.wandb": "offline"} | changes).items()
        ]
        found: dict[str, list[dict[str, Any]]] = {title: [] for title in WAYS}
        for number in range(own["rounds"]):
            for title, arguments in WAYS.items():
                shutil.rmtree(folder / "store" / "outputs", ignore_errors=True)
                found[title].append(
                    trained(sys.executable if title == "ours" else python, arguments, folder)
                )
                print(
                    f"round {number + 1}: {title} {found[title][-1]}", file=sys.stderr, flush=True
                )
    show(found, examples)
    print(f"\nMedians of {own['rounds']} rounds, {examples:,} examples each. {conditions()}")


def show(found: dict[str, list[dict[str, Any]]], examples: int) -> None:
    """Examples a second of each way, and ours against it."""
    whole = [
        [sum(parts) for parts in zip(told["seconds"], told["filling"], strict=True)]
        for told in found["ours"]
    ]
    ways = {
        title: [told["seconds"] for told in answers]
        for title, answers in found.items()
        if title != "ours"
    }
    ways |= {
        "ours, the cache filled": whole,
        "ours, the cache there": [told["seconds"] for told in found["ours"]],
    }
    medians = {
        title: [statistics.median(column) for column in zip(*seconds, strict=True)]
        for title, seconds in ways.items()
    }
    rows = []
    for title, seconds in medians.items():
        ratios = [
            f"{theirs / mine:.2f}"
            for theirs, mine in zip(seconds, medians["ours, the cache filled"], strict=True)
        ]
        answers = found.get(title, found["ours"])
        quality = [
            f"{statistics.median(told[split] for told in answers):.3f}"
            for split in ("validation", "test")
        ]
        rows.append(
            [
                title,
                *(f"{examples / each:.0f}" for each in reversed(seconds)),
                *reversed(ratios),
                *quality,
            ]
        )
    titles = [
        "examples a CPU second",
        "examples a second",
        "ours is faster by, CPU",
        "by the clock",
        "validation accuracy",
        "test accuracy",
    ]
    print(table(["", *titles], rows))


if __name__ == "__main__":
    main()
