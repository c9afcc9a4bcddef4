"""The student stage of a recipe compared with Hugging Face's Trainer and with torchdistill.

    python scripts/bench_peers.py [recipe=bert_to_distil] [rounds=3] [environment=FOLDER]
                                  [key=value ...]

All train the same model on the same examples with the same number of epochs and batch size;
single-label classification only. Each training runs in its own process, and they are interleaved.
The peers are the programs in `scripts/peers/` at their default settings, but for the learning rate.
accelerate, torchvision and torchdistill are installed into a separate environment (temporary unless
a folder is given) that also sees the project's packages. The time is that of training, without
imports and loading. Ours is the complete stage with validation runs, checkpoints and the saved
student, once with filling the teacher's cache and once without. CPU seconds do not depend on what
else the machine does; with several threads or on a GPU compare wall time. A peer whose packages are
missing, without a network for example, is left out.
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

from benchmark import compose_run, conditions, options, table

from distill import models, student, teacher
from distill.prepare import prepare_run
from distill.training.loggers import Tracker

PEERS = Path(__file__).parent / "peers"
PACKAGES = ["accelerate>=1.12", "psutil", "pillow", "torchvision", "torchdistill==1.1.5"]
OURS, FILLED = "ours, without filling the cache", "ours, with filling the cache"
PROGRAMS = {  # title -> script and its arguments
    "Hugging Face Trainer, defaults": ["hf_trainer.py", "default"],
    "Hugging Face Trainer, tuned": ["hf_trainer.py", "tuned"],
    "torchdistill, defaults": ["torchdistill_box.py"],
    OURS: ["ours.py"],
}
TITLES = (
    "",
    "examples a CPU second",
    "examples a second",
    "ours is faster by, CPU",
    "wall time",
    "validation accuracy",
    "test accuracy",
)


def environment_python(folder: Path) -> Path:
    """The python of an environment with the peers installed, which is created if necessary."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, symlinks=True)
        site_packages = next(folder.glob("lib/python*/site-packages"))
        (site_packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        install = ["install", "--quiet", "--no-deps", *PACKAGES]
        if subprocess.run([*pip, *install], stdout=sys.stderr).returncode:
            print("the peers' packages cannot be installed here", file=sys.stderr)
    return python


def write_job(changes: dict[str, Any], folder: Path) -> int:
    """Save teacher, untrained student, encoded examples and settings for every program.

    Returns:
        Number of examples of all epochs.
    """
    run = compose_run(changes)
    made = prepare_run(run)
    tracker = Tracker(run, folder)
    teacher_model = teacher.obtain(run, made, folder, tracker)
    student_model, _ = student.build_student(run.student, made, teacher_model)
    for name, model in (("teacher", teacher_model), ("start", student_model)):
        models.save(model, made.tokenizer, folder / name)  # type: ignore[arg-type]
    for name, split in made.examples.items():
        rows = split.select_columns(["input_ids", "labels"]).to_list()
        (folder / f"{name}.json").write_text(json.dumps(rows))
    job = {
        "lr": run.optimizer.lr,
        "epochs": round(run.trainer.epochs),
        "batch_size": run.data.batch_size,
        "seed": run.seed,
        "alpha": run.loss.alpha,
        "temperature": run.loss.temperature,
        "pad_id": made.tokenizer.pad_token_id,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job["epochs"] * len(made.examples["train"])


def train(python: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a program; returns the JSON that it prints last."""
    command = [python, str(PEERS / arguments[0]), str(folder), *arguments[1:]]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    settings, changes = options({"rounds": 3, "environment": ""})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DISTILL_CACHE"] = str(folder / "store")
        python = environment_python(Path(settings["environment"] or folder / "environment"))
        examples = write_job(changes, folder)
        keys = {"tracking.wandb": "offline"} | changes
        PROGRAMS[OURS] += [f"{key}={value}" for key, value in keys.items()]
        results: dict[str, list[dict[str, Any]]] = {title: [] for title in PROGRAMS}
        for number in range(settings["rounds"]):
            for title, arguments in PROGRAMS.items():
                shutil.rmtree(folder / "store" / "outputs", ignore_errors=True)
                interpreter = sys.executable if title == OURS else str(python)
                try:
                    results[title].append(train(interpreter, arguments, folder))
                except RuntimeError as error:
                    if title == OURS:
                        raise
                    print(f"{title} is left out: {error}", file=sys.stderr)
                    continue
                print(f"round {number + 1}: {title} {results[title][-1]}", file=sys.stderr)
    results = {title: runs for title, runs in results.items() if runs}
    print(table(TITLES, table_rows(results, examples)))
    print(f"\nMedians of {settings['rounds']} rounds, {examples:,} examples each. {conditions()}")


def table_rows(results: dict[str, list[dict[str, Any]]], examples: int) -> list[list[str]]:
    """Examples per second of each program, and the speed of ours relative to it."""
    seconds = {title: [each["seconds"] for each in runs] for title, runs in results.items()}
    seconds[FILLED] = [
        [sum(parts) for parts in zip(each["seconds"], each["filling"], strict=True)]
        for each in results[OURS]
    ]
    medians = {
        title: [statistics.median(column) for column in zip(*times, strict=True)]
        for title, times in seconds.items()
    }
    rows = []
    for title, (wall, cpu) in medians.items():
        runs = results.get(title, results[OURS])
        accuracies = [
            statistics.median(each[split] for each in runs) for split in ("validation", "test")
        ]
        speeds = [f"{examples / cpu:.0f}", f"{examples / wall:.0f}"]
        ratios = [f"{cpu / medians[FILLED][1]:.2f}", f"{wall / medians[FILLED][0]:.2f}"]
        rows.append([title, *speeds, *ratios, *(f"{value:.3f}" for value in accuracies)])
    return rows


if __name__ == "__main__":
    main()
