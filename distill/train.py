"""`python -m distill.train recipe=bert_to_distil`: the whole way, from a recipe to a proven student."""

import os
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distill import launch, recipe, resume, signals, store
from distill.cli import command
from distill.config import Run
from distill.errors import Stopped, UserError
from distill.stages import Stages


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Every stage of one run, in the order of the data. Returns what `metrics.json` holds; the rest is in the folder.

    In a folder in which this run was cut short it goes on from there.
    """
    from distill import data, evaluate, fit, models, ranks, student, targets, teacher
    from distill.tracking import Tracker

    fit.check_device(run.trainer)
    run = fit.decided(run)
    callbacks = student.callbacks(run)
    with ranks.first_then_others():
        stage = resume.take_up(run, folder, ranks.is_first())
    if stage.finished:
        print(f"{folder} is finished: nothing is left to do")
        return evaluate.read(folder)
    with stage("data"), ranks.first_then_others():
        task = targets.build(run.task)
        raw = data.load(run.data, task, run.seed)
        tokenizer = models.tokenizer_for(run, task, raw["train"])
        examples = data.encode(raw, task, tokenizer, run.data)
        callbacks = student.informed(run, task, tokenizer, callbacks, raw["train"], examples["train"])
        resume.same_examples(run, stage, data.fingerprint(examples["train"]))
    if ranks.is_first():
        recipe.save(run, folder / resume.RECIPE)  # where keys have changed, they hold from here on
    tracker = Tracker(run, folder)
    if not stage.done("student"):
        with stage("teacher"):
            tutor = teacher.obtain(run, task, tokenizer, examples, folder, tracker)
        with stage("cache"):
            examples["train"] = teacher.with_outputs(run, tutor, examples["train"], task, tokenizer)
        with stage("student"):
            stage.found["training"] = student.distil(run, task, tokenizer, examples, tutor, callbacks, folder, tracker)
    metrics = _outcome(run, task, raw["test"], examples["test"], tokenizer, folder, stage) if ranks.is_first() else {}
    tracker.finish(metrics)
    stage.finish()
    return ranks.share(metrics)


def _outcome(run: Run, task: Any, raw: Any, examples: Any, tokenizer: Any, folder: Path, stage: Stages) -> dict[str, Any]:
    """Measure the run's models and export its student; `raw` and `examples` are the test split."""
    from distill import evaluate, export, models

    metrics = evaluate.read(folder)
    artefact: Path | None = folder / export.FINAL
    if not (stage.done("evaluate") and metrics):
        with stage("evaluate"):
            metrics = evaluate.evaluate(run, task, raw, examples, tokenizer, folder)
            metrics |= {"training": stage.found["training"], "stages": stage.seconds}
            evaluate.write(metrics, folder)  # kept even if the export should fail
            evaluate.report(metrics, folder)
    if not stage.done("export"):
        with stage("export"):
            own = models.load_tokenizer(str(folder / "student"))  # callbacks may have trimmed it
            artefact = export.export(run, task, raw, own, folder, metrics)
    metrics["stages"] = stage.seconds
    evaluate.write(metrics, folder)
    evaluate.show(metrics, folder, artefact)
    return metrics


@command
def main() -> None:
    launch.follow()
    try:
        with signals.answered():
            launch.ARGUMENTS[:] = resume.arguments(sys.argv[1:])
            sys.argv[1:] = recipe.register(list(launch.ARGUMENTS))
            hydra.main(version_base="1.3", config_path=None, config_name="run")(_one_run)()
    except signals.Asked as asked:
        raise Stopped(f"{asked} came before the run had begun: the same command begins it", 75) from None


@command
def _one_run(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # as the user would type it
    fresh = resume.is_new(folder)
    try:
        _as_ranks(recipe.checked(composed), folder)
    except (KeyboardInterrupt, signals.Asked) as asked:
        raise _stopped(folder, fresh, getattr(asked, "number", signal.SIGINT)) from None
    except Exception:
        if fresh and os.environ.get("RANK", "0") == "0":
            resume.clear(folder)  # a refused recipe leaves nothing behind, and takes nothing away
        raise


def _stopped(folder: Path, fresh: bool, number: int) -> Stopped:
    """What is said to somebody who asked for the end."""
    if (folder / resume.RECIPE).exists():
        way_on = f"go on with {resume.command(folder)}"
    else:
        way_on = "that was before the run had begun, and the same command begins it"
        if fresh:
            resume.clear(folder)
    said, code = signals.ending(number)
    return Stopped(f"{said}: {way_on}", code)


def _as_ranks(run: Run, folder: Path) -> None:
    """Train in this process, or in the processes that it starts, or as one of those that others have started."""
    count = launch.devices(run.trainer)
    if count and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(f"trainer.devices is {count}, but a sweep has one process for each of its runs: start the runs one by one")
    if count:
        code = launch.launch("distill.train", folder, count)
        sys.exit(code)
    from distill import ranks

    ranks.start(run.trainer)
    shared = Path(ranks.share(str(folder)))
    if shared != folder:
        with suppress(OSError):
            folder.rmdir()  # Hydra names one for each process
    try:
        with store.alone(shared) if ranks.is_first() else nullcontext():
            train(run, shared)
    finally:
        ranks.end()


if __name__ == "__main__":
    launch.run(main)
