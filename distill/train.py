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

from distill import resume, store
from distill.cli import cli_command
from distill.errors import Stopped, UserError
from distill.processes import launch, signals
from distill.recipe import compose
from distill.recipe.config import Run
from distill.stages import Stages


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Every stage of one run, in the order of the data. Returns what `metrics.json` holds; the rest is in the folder.

    In a folder in which this run was cut short it goes on from there.
    """
    from distill import data, evaluate, models, student, teacher
    from distill.processes import ranks
    from distill.recipe import targets
    from distill.training import loop
    from distill.training.loggers import Tracker

    loop.check_device(run.trainer)
    run = loop.resolve_auto(run)
    callbacks = student.build_callbacks(run)
    with ranks.rank_zero_first():
        stage = resume.open_run_folder(run, folder, ranks.is_rank_zero())
    if stage.finished:
        print(f"{folder} is finished: nothing is left to do")
        return evaluate.read(folder)
    with stage("data"), ranks.rank_zero_first():
        task = targets.instantiate(run.task)
        raw = data.load(run.data, task, run.seed)
        tokenizer = models.build_tokenizer(run, task, raw["train"])
        examples = data.encode(raw, task, tokenizer, run.data)
        callbacks = student.bind_callbacks(
            run, task, tokenizer, callbacks, raw["train"], examples["train"]
        )
        resume.check_same_examples(run, stage, data.fingerprint(examples["train"]))
    if ranks.is_rank_zero():
        compose.save_recipe(
            run, folder / resume.RECIPE_FILE
        )  # where keys have changed, they hold from here on
    tracker = Tracker(run, folder)
    if not stage.done("student"):
        with stage("teacher"):
            tutor = teacher.obtain(run, task, tokenizer, examples, folder, tracker)
        with stage("cache"):
            examples["train"] = teacher.with_outputs(run, tutor, examples["train"], task, tokenizer)
        with stage("student"):
            stage.results["training"] = student.distil(
                run, task, tokenizer, examples, tutor, callbacks, folder, tracker
            )
    metrics = (
        _outcome(run, task, raw["test"], examples["test"], tokenizer, folder, stage)
        if ranks.is_rank_zero()
        else {}
    )
    tracker.finish(metrics)
    stage.finish()
    return ranks.broadcast(metrics)


def _outcome(
    run: Run, task: Any, raw: Any, examples: Any, tokenizer: Any, folder: Path, stage: Stages
) -> dict[str, Any]:
    """Measure the run's models and export its student; `raw` and `examples` are the test split."""
    from distill import evaluate, export, models

    metrics = evaluate.read(folder)
    artefact: Path | None = folder / export.FINAL
    if not (stage.done("evaluate") and metrics):
        with stage("evaluate"):
            metrics = evaluate.evaluate(run, task, raw, examples, tokenizer, folder)
            metrics |= {"training": stage.results["training"], "stages": stage.seconds}
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


@cli_command
def main() -> None:
    launch.exit_with_parent()
    try:
        with signals.raise_on_stop_signals():
            launch.ARGUMENTS[:] = resume.expand_resume(sys.argv[1:])
            sys.argv[1:] = compose.register_recipes(list(launch.ARGUMENTS))
            hydra.main(version_base="1.3", config_path=None, config_name="run")(_one_run)()
    except signals.StopRequested as asked:
        raise Stopped(
            f"{asked} came before the run had begun: the same command begins it", 75
        ) from None


@cli_command
def _one_run(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # as the user would type it
    fresh = resume.is_unused(folder)
    try:
        _as_ranks(compose.validate(composed), folder)
    except (KeyboardInterrupt, signals.StopRequested) as asked:
        raise _stopped(folder, fresh, getattr(asked, "number", signal.SIGINT)) from None
    except Exception:
        if fresh and os.environ.get("RANK", "0") == "0":
            resume.remove_if_unused(
                folder
            )  # a refused recipe leaves nothing behind, and takes nothing away
        raise


def _stopped(folder: Path, fresh: bool, number: int) -> Stopped:
    """What is said to somebody who asked for the end."""
    if (folder / resume.RECIPE_FILE).exists():
        way_on = f"go on with {resume.resume_command(folder)}"
    else:
        way_on = "that was before the run had begun, and the same command begins it"
        if fresh:
            resume.remove_if_unused(folder)
    said, code = signals.exit_status(number)
    return Stopped(f"{said}: {way_on}", code)


def _as_ranks(run: Run, folder: Path) -> None:
    """Train in this process, or in the processes that it starts, or as one of those that others have started."""
    count = launch.processes_to_start(run.trainer)
    if count and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            f"trainer.devices is {count}, but a sweep has one process for each of its runs: start the runs one by one"
        )
    if count:
        code = launch.launch("distill.train", folder, count)
        sys.exit(code)
    from distill.processes import ranks

    ranks.join_process_group(run.trainer)
    shared = Path(ranks.broadcast(str(folder)))
    if shared != folder:
        with suppress(OSError):
            folder.rmdir()  # Hydra names one for each process
    try:
        with store.exclusive_access(shared) if ranks.is_rank_zero() else nullcontext():
            train(run, shared)
    finally:
        ranks.leave_process_group()


if __name__ == "__main__":
    launch.run_and_exit(main)
