"""A run folder that has been worked in before: may this recipe go on in it, and what is done again?

The folder's `recipe.yaml` is what counts. What changes no result may differ, and is then written there.
"""

import logging
import shlex
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill import store
from distill.errors import UserError
from distill.recipe import compose
from distill.recipe.config import Run
from distill.stages import PROGRESS, Stages

log = logging.getLogger("distill")

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "train.log"
OWN = (RECIPE_FILE, PROGRESS, LOG_FILE)  # of a run that has made nothing yet
RUNS = "runs"
ALL = ("student", "evaluate", "export")
# beginnings of keys -> the stages that are done again where such a key differs; where any other differs, the run is another one
HARMLESS: dict[str, tuple[str, ...]] = {
    "name": (),
    "data.workers": (),
    "trainer.progress": (),
    "trainer.compile": (),
    "trainer.checkpoint.": (),
    "trainer.devices": (),
    "trainer.nodes": (),
    "trainer.strategy": (),
    "tracking.": (),
    "evaluate.bootstrap": ("evaluate", "export"),
    "evaluate.requests": ("evaluate", "export"),
    "evaluate.batches": ("evaluate", "export"),
    "evaluate.threads": ("evaluate", "export"),
    "export.": ("evaluate", "export"),
}
LENGTHS = ("trainer.epochs", "trainer.max_steps")  # may grow


def expand_resume(given: list[str]) -> list[str]:
    """A command line in which `resume=FOLDER` is replaced by the folder and the recipe in it."""
    named = [
        argument.removeprefix("resume=") for argument in given if argument.startswith("resume=")
    ]
    if not named:
        return given
    others = [argument for argument in given if not argument.startswith("resume=")]
    for argument in others:
        if argument.startswith(("recipe=", "hydra.run.dir=")) or argument in ("-m", "--multirun"):
            raise UserError(
                f"resume is {named[0]} and {argument} is given too, but the folder has its own recipe: leave {argument} out"
            )
    folder = _last() if named[-1] == "last" else Path(named[-1]).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"resume is {named[-1]}, but there is no such folder: give the folder of a run, such as runs/NAME/TIME, or last"
        )
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"resume is {folder}, but it holds no {RECIPE_FILE}: give the folder of a run, or start one with recipe="
        )
    return [
        f"recipe={folder / RECIPE_FILE}",
        *others,
        f"hydra.run.dir={compose.quote_override(str(folder))}",
    ]


def _last() -> Path:
    """The run that was worked in last."""
    found = [file.parent for file in Path(RUNS).rglob(RECIPE_FILE)]
    if not found:
        raise UserError(
            f"resume is last, but there is no run under {Path(RUNS).absolute()}: give the folder of a run"
        )
    return max(
        found,
        key=lambda folder: max(
            (folder / name).stat().st_mtime for name in OWN if (folder / name).is_file()
        ),
    )


def resume_command(folder: Path) -> str:
    """What a user types to go on."""
    return f"python -m distill.train resume={shlex.quote(str(folder))}"


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left half-written; an earlier export that it had put aside comes back."""
    for left in sorted(folder.rglob(f"{store.TEMPORARY_PREFIX}*"), reverse=True):
        store.remove_abandoned(left.parent, owned=True)
    for draft in folder.glob(".export-*"):
        if draft.name.endswith("-old") and not (folder / "export").exists():
            draft.replace(folder / "export")
        else:
            shutil.rmtree(draft)


def is_unused(folder: Path) -> bool:
    """Whether nothing is there, but for the log if Hydra has opened it."""
    return all((file.name, file.stat().st_size) == (LOG_FILE, 0) for file in folder.iterdir())


def remove_if_unused(folder: Path) -> None:
    """Remove what a run has left that ended before it made anything; a folder in which anything else is, or anybody at work, stays."""
    with suppress(UserError, OSError), store.exclusive_access(folder, patience=0):
        if not Stages(folder).done("data") and {file.name for file in folder.iterdir()} <= {*OWN}:
            for name in OWN:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def open_run_folder(run: Run, folder: Path, writes: bool = True) -> Stages:
    """What is done in this folder: nothing where it is new. UserError where it holds another run, or no run but other files.

    Only one process of a run writes.
    """
    file = folder / RECIPE_FILE
    others = sorted(
        name
        for other in folder.glob("*")
        if (name := other.name) not in OWN and not name.startswith(store.TEMPORARY_PREFIX)
    )
    if others and not file.is_file():
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"hydra.run.dir is {folder}, but it holds {listed} and no {RECIPE_FILE}: name an empty folder, or that of a run"
        )
    changed = (
        differences(compose.load_recipe(str(file)), compose.with_absolute_paths(run))
        if file.is_file()
        else {}
    )
    again = _judged(folder, changed)
    stage = Stages(folder, writes)
    if again:
        stage.again(again)
    if writes:
        remove_leftovers(folder)
        if not file.is_file():
            compose.save_recipe(run, file)
    return stage


def check_same_examples(run: Run, stage: Stages, fingerprint: str) -> None:
    """UserError where a run goes on with other examples than it began with."""
    if stage.results.setdefault("examples", fingerprint) != fingerprint:
        raise UserError(
            f"data.source is {run.data.source}, but its examples are not those with which the run began: "
            "bring them back, or start a new run"
        )


def differences(earlier: Run, now: Run) -> dict[str, tuple[Any, Any]]:
    """Key -> value then and now, of those keys that differ."""
    before, after = (_flat("", asdict(run)) for run in (earlier, now))
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: inner
        for name, part in value.items()
        for key, inner in _flat(f"{prefix}.{name}" if prefix else str(name), part).items()
    }


def _judged(folder: Path, changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """The stages to be done again; says what is taken, and refuses what would make it another run."""
    stages = {key: _stages(key, *values) for key, values in changed.items()}
    harmful = [_said(key, changed[key]) for key, again in stages.items() if again is None]
    if harmful:
        raise UserError(
            f"resume is {folder}, but its run began with another recipe, and these decide its result: {', '.join(harmful)}: "
            "leave them as they were, or start a new run"
        )
    if changed:
        log.info(
            "the recipe has changed: %s",
            ", ".join(_said(key, values) for key, values in changed.items()),
        )
    return [name for name in ALL if any(name in (again or ()) for again in stages.values())]


def _stages(key: str, before: Any, now: Any) -> tuple[str, ...] | None:
    """What is done again where this key differs; null where that is another run."""
    if key in LENGTHS:
        return ALL if before is not None and now is not None and now > before else None
    return next((again for beginning, again in HARMLESS.items() if key.startswith(beginning)), None)


def _said(key: str, values: tuple[Any, Any]) -> str:
    before, now = ("null" if value is None else value for value in values)
    return f"{key} was {before} and is {now}"
