"""`python -m distill.train recipe=bert_to_distil`: the whole way, from a recipe to a proven student."""

import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill import recipe
from distill.cli import command
from distill.config import Run


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Every stage of one run, in the order of the data. Returns what `metrics.json` holds; the rest is in the folder."""
    from distill import data, evaluate, export, fit, models, student, targets, teacher
    from distill.stages import Stages
    from distill.tracking import Tracker

    fit.check_device(run.trainer)
    callbacks = student.callbacks(run)
    stage = Stages()
    with stage("data"):
        task = targets.build(run.task)
        raw = data.load(run.data, task, run.seed)
        tokenizer = models.tokenizer_for(run, task, raw["train"])
        examples = data.encode(raw, task, tokenizer, run.data)
        callbacks = student.informed(run, task, tokenizer, callbacks, raw["train"], examples["train"])
    recipe.save(run, folder / "recipe.yaml")
    tracker = Tracker(run, folder)
    with stage("teacher"):
        tutor = teacher.obtain(run, task, tokenizer, examples, folder, tracker)
    with stage("cache"):
        examples["train"] = teacher.with_outputs(run, tutor, examples["train"], task, tokenizer)
    with stage("student"):
        training = student.distil(run, task, tokenizer, examples, tutor, callbacks, folder, tracker)
    with stage("evaluate"):
        metrics = evaluate.evaluate(run, task, raw["test"], examples["test"], tokenizer, folder)
        metrics |= {"training": training, "stages": stage.seconds}
        evaluate.write(metrics, folder)  # kept even if the export should fail
        evaluate.report(metrics, folder)
    with stage("export"):
        own = models.load_tokenizer(str(folder / "student"))  # callbacks may have trimmed it
        artefact = export.export(run, task, raw["test"], own, folder, metrics)
    evaluate.write(metrics, folder)
    tracker.finish(metrics)
    evaluate.show(metrics, folder, artefact)
    return metrics


@command
def main() -> None:
    sys.argv[1:] = recipe.register(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=None, config_name="run")(_one_run)()


@command
def _one_run(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # as the user would type it
    try:
        train(recipe.checked(composed), folder)
    except Exception:
        if {file.name for file in folder.iterdir()} <= {"train.log"}:
            shutil.rmtree(folder)  # a refused recipe leaves nothing behind, and takes nothing away
        raise


if __name__ == "__main__":
    main()
