"""`python -m distill.train recipe=bert_to_distil`: from a recipe to a proven student."""

import os
import signal
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distill import resume
from distill.cli import cli_command
from distill.errors import Stopped, UserError
from distill.places import check_places
from distill.processes import environment, exits, signals
from distill.recipe import compose, hydra_config, trust
from distill.recipe.arguments import quote
from distill.recipe.config import Run
from distill.stages import Stages

if TYPE_CHECKING:
    from distill.evaluate.records import Metrics
    from distill.prepare import Prepared


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Run every stage of a recipe, in the order of the data.

    In the folder of an interrupted run, it resumes.

    Args:
        run: the recipe.
        folder: the run folder, for all files of the run.

    Returns:
        The contents of `metrics.json`.
    """
    from distill import data, evaluate, student, teacher, training
    from distill.dry_run import DryRun
    from distill.prepare import prepare_run
    from distill.processes import ranks

    training.check_device(run.trainer)
    run = training.resolve_auto(run)
    callbacks = training.build_callbacks(run.callbacks, run.trainer, run.export)
    training.check_optimizer(run.optimizer, callbacks)
    training.check_memory(run.student.lora, run.teacher, callbacks)
    training.check_completions(run.loss.completions_url, callbacks)
    with ranks.rank_zero_first():
        stage = resume.open_run_folder(run, folder, ranks.is_rank_zero())
    if stage.finished:
        print(f"{folder} is finished: nothing is left to do")
        earlier = evaluate.read_metrics(folder)
        return {} if earlier is None else earlier.to_json()
    if not stage.done("student"):
        training.check_server(run.loss, adapter=run.student.lora is not None)
    with stage("data"), ranks.rank_zero_first():
        if ranks.is_rank_zero():
            check_places(folder)
            training.check_tracking(run.tracking)
        prepared = prepare_run(run)
        steps = student.count_steps(prepared, run.loss, run.trainer, run.data.batch_size)
        callbacks = training.bind_callbacks(
            callbacks, prepared.tokenizer, prepared.raw["train"], run.data.text, steps
        )
        if ranks.is_rank_zero():
            evaluate.check_settings(run.evaluate, prepared.task)
        if ranks.is_rank_zero() and not stage.done("teacher"):
            DryRun(run, prepared, callbacks, steps).check()
        fingerprint = data.fingerprint(prepared.examples["train"])
        resume.check_same_examples(run.data.source, stage, fingerprint)
        stage.results.setdefault("holdout", data.HOLDOUT_VERSION)
    if ranks.is_rank_zero():
        compose.save_recipe(run, folder / resume.RECIPE_FILE)  # keys may have changed
    tracker = training.Tracker(run, folder)
    if not stage.done("student"):
        with stage("teacher"):
            frozen = teacher.obtain(run, prepared, folder, tracker)
        with stage("cache"):
            prepared = teacher.with_outputs(run, prepared, frozen)
        with stage("student"):
            stage.results["training"] = student.train_student(
                run, prepared, frozen, callbacks, folder, tracker
            )
    metrics: dict[str, Any] = {}
    if ranks.is_rank_zero():
        metrics = _measure_and_export(run, prepared, folder, stage).to_json()
    tracker.finish(metrics)
    stage.finish()
    return ranks.broadcast(metrics)


def _measure_and_export(run: Run, prepared: "Prepared", folder: Path, stage: Stages) -> "Metrics":
    """Measure the models on the test split and export the student, which is written once."""
    from distill import evaluate, export, isolated

    metrics = evaluate.read_metrics(folder)
    final = folder / export.FINAL
    measured, exported = stage.done("evaluate") and metrics, stage.done("export")
    if not (measured and exported):
        spec = evaluate.export_spec(run.export, run.data, prepared, folder / "student")
        warm = isolated.warm_process(prepared.task.auto_class, run.evaluate.threads)
        with warm, export.write_draft(spec, folder) as draft:
            if not measured:
                with stage("evaluate"):
                    shipped = draft.measured if draft else None
                    metrics = evaluate.evaluate(run, prepared, folder, shipped=shipped)
                    training = stage.results["training"]
                    metrics = replace(metrics, training=training, stages=stage.seconds)
                    with evaluate.show_on_error(metrics):
                        evaluate.write_metrics(metrics, folder)  # kept even if the export fails
                        evaluate.write_report(metrics, folder)
            if not exported:
                with evaluate.show_on_error(metrics), stage("export"):
                    texts = prepared.raw["test"]
                    if draft is not None:
                        export.prove_and_publish(draft, run, spec, texts, folder, metrics)
    assert metrics is not None
    metrics = replace(metrics, stages=stage.seconds)
    with evaluate.show_on_error(metrics):
        evaluate.write_metrics(metrics, folder)
    evaluate.show(metrics, folder, final if run.export.format else None)
    return metrics


@cli_command
def main() -> None:
    """Read the command line and run the recipe, or each recipe of a sweep."""
    exits.exit_with_launcher()
    try:
        with signals.raise_on_stop_signals():
            arguments = resume.expand_resume(trust.take_from_arguments(sys.argv[1:]))
            sys.argv[1:] = hydra_config.register_recipes(arguments)
            _hydra_main(arguments)
    except signals.StopRequested as request:
        raise Stopped(
            f"{request} arrived before the run started: the same command starts it", 75
        ) from None


def _hydra_main(arguments: list[str]) -> None:
    def run(composed: DictConfig) -> None:
        with exits.exit_on_error():  # before Hydra prints an error that another rank has caused
            _run_composed(composed, arguments)

    hydra.main(version_base="1.3", config_path=None, config_name="run")(run)()


@cli_command
def _run_composed(composed: DictConfig, arguments: list[str]) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # as the user would type it
    new = resume.is_unused(folder)
    try:
        _run_on_ranks(compose.validate(composed), folder, arguments)
    except (KeyboardInterrupt, signals.StopRequested) as request:
        raise _stopped(folder, new, getattr(request, "number", signal.SIGINT)) from None
    except Exception:
        if new and os.environ.get("RANK", "0") == "0":
            resume.remove_if_unused(folder)
        raise


def _stopped(folder: Path, new: bool, number: int) -> Stopped:
    """How to continue a run that this signal stopped; removes a new folder without results."""
    if (folder / resume.RECIPE_FILE).exists():
        way_out = f"continue with {resume.resume_command(folder)}"
    else:
        way_out = "that was before the run started, and the same command starts it"
        if new:
            resume.remove_if_unused(folder)
    outcome, code = signals.exit_status(number)
    return Stopped(f"{outcome}: {way_out}", code)


def _run_on_ranks(run: Run, folder: Path, arguments: list[str]) -> None:
    """Train in this process, in processes started here, or as one of those of torchrun or srun."""
    count = environment.processes_to_start(run.trainer)
    if count:
        _launch(count, folder, arguments)
    from distill.models import redirect_library_logs
    from distill.processes import group, ranks

    redirect_library_logs()
    group.join_process_group(run.trainer)
    shared = Path(ranks.broadcast(str(folder)))
    if shared != folder:
        with suppress(OSError):
            folder.rmdir()  # Hydra made one for each process
    with resume.lock_run_folder(shared) if ranks.is_rank_zero() else nullcontext():
        train(run, shared)
    group.leave_process_group()  # not after an error: it is reported before others fail


def _launch(count: int, folder: Path, arguments: list[str]) -> NoReturn:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            f"trainer.devices is {count}, but a sweep runs each recipe in one process: "
            "start the runs one by one"
        )
    from distill.processes.launch import launch  # imports torch

    shared = [*arguments, f"hydra.run.dir={quote(str(folder))}"]
    sys.exit(launch("distill.train", shared, count, folder / resume.LOG_FILE))


if __name__ == "__main__":
    exits.run_and_exit(main)
