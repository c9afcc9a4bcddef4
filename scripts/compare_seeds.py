"""The same student with and without its teacher, over several seeds.

    python scripts/compare_seeds.py recipe=bert_to_distil seeds=0,1,2
                                    [metric=accuracy] [slower=4] [key=value ...]

Each seed draws the labelled examples and the order of training anew. The students without a
teacher train on the labels alone, for as many optimizer steps of the same batch size, with the
learning rate of the recipe and one that is `slower` times smaller (0: not), from the same weights.
Where the recipe fine-tunes the teacher, another one starts from layers of the model before that;
where it does not, the student before any training is measured too. Prints a Markdown table with
95 % t intervals over the seeds. A perplexity is better the lower it is, other metrics the higher.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
NOT_FINETUNED = {  # one step with a learning rate too small to change float32 weights
    "teacher.finetune.epochs": "0.01",
    "teacher.finetune.lr": "1e-12",
}
UNTRAINED = {"trainer.max_steps": "1", "optimizer.lr": "1e-12"}
QUICK = {
    "export.format": "null",
    "evaluate.requests": "1",
    "evaluate.batches": "1",
    "evaluate.bootstrap": "1",
    "evaluate.generate": "false",
    "tracking.wandb": "disabled",
}
WITH_TEACHER = "student, with teacher"


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    seeds = [int(seed) for seed in arguments.pop("seeds", "0,1,2").split(",")]
    if len(seeds) not in T_975:
        sys.exit(
            f"seeds has {len(seeds)} values, but an interval needs 2 to {max(T_975)}: "
            "separate them by commas"
        )
    metric = arguments.pop("metric", "accuracy")
    slower = float(arguments.pop("slower", "4"))
    values: dict[str, list[float]] = {"teacher": []}
    for seed in seeds:
        seeded = {**arguments, "seed": str(seed)}
        with_teacher, steps = train(seeded)
        of_models = {"teacher": with_teacher["teacher"], WITH_TEACHER: with_teacher["student"]}
        for name, arm in other_arms(arguments, steps, slower):
            of_models[name] = train({**seeded, **arm})[0]["student"]
        for name, model in of_models.items():
            value = model["quality"][metric]["value"]
            values.setdefault(name, []).append(value)
            print(f"seed {seed}: {name} {value:.4g}", file=sys.stderr)
    show(values, metric)


def other_arms(
    options: dict[str, str], steps: int, slower: float
) -> Iterator[tuple[str, dict[str, str]]]:
    """Names and options of the students without a teacher."""
    from distill import load_recipe

    recipe = load_recipe(options["recipe"])
    lr = float(options.get("optimizer.lr", recipe.optimizer.lr))
    alone = {"loss.alpha": "1", "trainer.max_steps": str(steps)}
    yield "student, labels alone", alone
    if slower:
        yield f"student, labels alone, lr / {slower:g}", {**alone, "optimizer.lr": str(lr / slower)}
    if recipe.teacher is not None and recipe.teacher.finetune is not None:
        before = "student, labels alone, from the model before fine-tuning"
        yield before, {**alone, **NOT_FINETUNED}
    else:
        yield "student before training", {**alone, **UNTRAINED}


def train(options: dict[str, str]) -> tuple[dict, int]:
    """metrics.json of one run, and the optimizer steps of its student."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "distill.train",
            *(f"{key}={value}" for key, value in {**QUICK, **options}.items()),
            f"hydra.run.dir={folder}",
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        return metrics, metrics["training"]["steps"]


def show(results: dict[str, list[float]], metric: str) -> None:
    """Print means over the seeds; differences and ratios are those of each seed."""
    with_teacher, teacher = results[WITH_TEACHER], results["teacher"]
    lower = metric == "perplexity"
    scale, digits, unit = (-1, 1, "") if lower else (100, 3, " points")
    print(f"| | {metric} | of the teacher's | the distilled student's lead |\n|---|---:|---:|---:|")
    for name, values in results.items():
        ratios = [100 * value / best for value, best in zip(values, teacher, strict=True)]
        leads = [scale * (ours - value) for ours, value in zip(with_teacher, values, strict=True)]
        lead = "" if values is with_teacher else f"{interval(leads, 1)}{unit}"
        print(f"| {name} | {interval(values, digits)} | {interval(ratios, 1)} % | {lead} |")
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
