"""The same student with and without its teacher, over several seeds.

    python scripts/compare_seeds.py recipe=bert_to_distil seeds=0,1,2
                                    [metric=accuracy] [key=value ...]

Each seed draws the labelled examples and trains the teacher and the student anew. The students
without a teacher train on the labels alone, for as many optimizer steps of the same batch size,
from the same initial weights (layers of the fine-tuned teacher) and from layers of the model before
fine-tuning. Prints a Markdown table with 95 % t intervals over the seeds.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # quantile of t, by number of seeds
NOT_FINETUNED = [  # one step with a learning rate too small to change float32 weights
    "teacher.finetune.epochs=0.01",
    "teacher.finetune.lr=1e-12",
]
QUICK = [
    "export.format=null",
    "evaluate.requests=1",
    "evaluate.batches=1",
    "evaluate.bootstrap=1",
    "tracking.wandb=disabled",
]


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    seeds = [int(seed) for seed in arguments.pop("seeds", "0,1,2").split(",")]
    if len(seeds) not in T_975:
        sys.exit(
            f"seeds has {len(seeds)} values, but an interval needs 2 to {max(T_975)}: "
            "separate them by commas"
        )
    metric = arguments.pop("metric", "accuracy")
    options = [f"{key}={value}" for key, value in arguments.items()]
    values: dict[str, list[float]] = {"teacher": []}
    for seed in seeds:
        with_teacher, steps = train([*options, f"seed={seed}"])
        alone = [*options, f"seed={seed}", "loss.alpha=1", f"trainer.max_steps={steps}"]
        arms = {
            "student, with teacher": with_teacher,
            "student, labels alone": train(alone)[0],
            "student, labels alone, lr / 4": train(
                [*alone, f"optimizer.lr={learning_rate(options) / 4}"]
            )[0],
            "student, labels alone, from the model before fine-tuning": train(
                [*alone, *NOT_FINETUNED]
            )[0],
        }
        values["teacher"].append(with_teacher["teacher"]["quality"][metric]["value"])
        for name, metrics in arms.items():
            values.setdefault(name, []).append(metrics["student"]["quality"][metric]["value"])
        print(
            f"seed {seed}: "
            + ", ".join(f"{name} {column[-1]:.3f}" for name, column in values.items()),
            file=sys.stderr,
        )
    show(values, metric)


def train(options: list[str]) -> tuple[dict, int]:
    """metrics.json of one run, and the optimizer steps of its student."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "distill.train",
            *QUICK,
            *options,
            f"hydra.run.dir={folder}",
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        return metrics, metrics["training"]["steps"]


def learning_rate(options: list[str]) -> float:
    from distill import load_recipe

    keys = dict(option.split("=", 1) for option in options)
    return float(keys.get("optimizer.lr", load_recipe(keys["recipe"]).optimizer.lr))


def show(results: dict[str, list[float]], metric: str) -> None:
    """Print means over the seeds; differences and ratios are those of each seed."""
    with_teacher, teacher = results["student, with teacher"], results["teacher"]
    print(f"| | {metric} | of the teacher's | the distilled student's lead |\n|---|---:|---:|---:|")
    for name, values in results.items():
        ratios = [100 * value / best for value, best in zip(values, teacher, strict=True)]
        leads = [100 * (ours - value) for ours, value in zip(with_teacher, values, strict=True)]
        lead = "" if values is with_teacher else f"{interval(leads, 1)} points"
        print(f"| {name} | {interval(values, 3)} | {interval(ratios, 1)} % | {lead} |")
    print(f"\n{len(teacher)} seeds; means and 95 % t intervals.")


def interval(values: list[float], digits: int) -> str:
    """Mean and half the width of its 95 % t interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
