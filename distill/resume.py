"""Resuming a run in its folder: allowed changes of the recipe, and the stages that they repeat.

A recipe is compared with the folder's `recipe.yaml`. Keys that change no result may differ, and are
updated there.
"""

import logging
import shlex
import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill import store
from distill.errors import UserError
from distill.recipe import compose
from distill.recipe.arguments import quote
from distill.recipe.config import Run
from distill.stages import PROGRESS, VERSION, Stages

__all__ = [
    "LOG_FILE",
    "RECIPE_FILE",
    "check_same_examples",
    "differences",
    "expand_resume",
    "is_unused",
    "lock_run_folder",
    "open_run_folder",
    "remove_if_unused",
    "remove_leftovers",
    "resume_command",
]

log = logging.getLogger("distill")

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "train.log"
RUNS = "runs"
_INITIAL = (RECIPE_FILE, PROGRESS, LOG_FILE, store.LOCK_FILE)  # files of a run without results
_AFTER_TEACHER = ("student", "evaluate", "export")
# prefixes of keys that may differ -> the stages that are then repeated
_HARMLESS: dict[str, tuple[str, ...]] = {
    "name": (),
    "data.workers": (),
    "teacher.url": (),
    "teacher.offload": (),
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
    "evaluate.generate": ("evaluate", "export"),
    "evaluate.max_new_tokens": ("evaluate", "export"),
    "evaluate.harness": ("evaluate", "export"),
    "export.": ("evaluate", "export"),
}
_LENGTHS = ("trainer.epochs", "trainer.max_steps")  # may grow
_SERVERS = ("loss.completions_url",)  # may move, but not come or go


def expand_resume(arguments: list[str]) -> list[str]:
    """Replace ``resume=FOLDER`` on a command line by the folder and its recipe.

    Raises:
        UserError: if the folder is not that of a run, or another argument contradicts it.
    """
    named = [text.removeprefix("resume=") for text in arguments if text.startswith("resume=")]
    if not named:
        return arguments
    others = [text for text in arguments if not text.startswith("resume=")]
    for argument in others:
        if argument.startswith(("recipe=", "hydra.run.dir=")) or argument in ("-m", "--multirun"):
            raise UserError(
                f"resume is {named[0]} and {argument} is given, but the folder has a recipe: "
                f"leave {argument} out"
            )
    folder = _run_folder(named[-1])
    directory = f"hydra.run.dir={quote(str(folder))}"
    return [f"recipe={folder / RECIPE_FILE}", *others, directory]


def _run_folder(name: str) -> Path:
    folder = _latest() if name == "last" else Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"resume is {name}, but there is no such folder: "
            "give the folder of a run, such as runs/NAME/TIME, or last"
        )
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"resume is {folder}, but it holds no {RECIPE_FILE}: "
            "give the folder of a run, or start one with recipe="
        )
    return folder


def _latest() -> Path:
    """The folder of the run that was modified last."""
    folders = [file.parent for file in Path(RUNS).rglob(RECIPE_FILE)]
    if not folders:
        raise UserError(
            f"resume is last, but there is no run in {Path(RUNS).absolute()}: "
            "give the folder of a run"
        )
    return max(folders, key=_modified)


def _modified(folder: Path) -> float:
    files = [folder / name for name in (RECIPE_FILE, PROGRESS, LOG_FILE)]
    return max(file.stat().st_mtime for file in files if file.is_file())


def resume_command(folder: Path) -> str:
    """The command that continues the run of a folder."""
    return f"python -m distill.train resume={shlex.quote(str(folder))}"


def remove_leftovers(folder: Path) -> None:
    """Remove incomplete files of a killed process, and restore the export that it was replacing."""
    for path in sorted(folder.rglob(f"{store.TEMPORARY_PREFIX}*"), reverse=True):
        store.remove_abandoned(path.parent, owned=True)
    for draft in folder.glob(".export-*"):
        if draft.name.endswith("-old") and not (folder / "export").exists():
            draft.replace(folder / "export")
        else:
            shutil.rmtree(draft)


def is_unused(folder: Path) -> bool:
    """Whether the folder has only the lock and an empty log, which Hydra opens."""
    return all(
        file.name == store.LOCK_FILE or (file.name, file.stat().st_size) == (LOG_FILE, 0)
        for file in folder.iterdir()
    )


def remove_if_unused(folder: Path) -> None:
    """Remove the folder of a run that ended before it had a result, and its parents if empty.

    A folder with other files, or in which another process is working, is not removed.
    """
    with suppress(UserError, OSError):
        if not _is_removable(folder):
            return
        with store.exclusive_access(folder, timeout=0):
            if _is_removable(folder):
                for name in _INITIAL:
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
                if folder.parent.parent.name == RUNS:  # runs/<name>/<time>
                    folder.parent.rmdir()
                    folder.parent.parent.rmdir()


def _is_removable(folder: Path) -> bool:
    return {file.name for file in folder.iterdir()} <= set(_INITIAL)


def lock_run_folder(folder: Path) -> AbstractContextManager[None]:
    """Exclusive access to the folder of a run.

    Raises:
        UserError: if the folder holds other files, or if another process is working in it.
    """
    _check_is_run_folder(folder)
    return store.exclusive_access(folder)


def open_run_folder(run: Run, folder: Path, writes: bool = True) -> Stages:
    """The stages of the run in this folder, with those that are done.

    Args:
        run: The recipe. It may differ from that of the folder in keys that change no result.
        folder: The run folder.
        writes: Whether this process writes to it; one process of a run does.

    Raises:
        UserError: if the folder has another run, or files but no run.
    """
    _check_is_run_folder(folder)
    file = folder / RECIPE_FILE
    changed = (
        differences(compose.load_recipe(str(file)), compose.with_absolute_paths(run))
        if file.is_file()
        else {}
    )
    repeated = _stages_to_repeat(folder, changed)
    stage = Stages(folder, writes)
    if lost := stage.lost(folder, run.export.format is not None):
        log.warning(
            "the files of the stages %s are no longer in %s: they are made again",
            " and ".join(lost),
            folder,
        )
    if repeated or lost:
        stage.again([*repeated, *lost])
    _check_version(folder, stage)
    if writes:
        remove_leftovers(folder)
        if not file.is_file():
            compose.save_recipe(run, file)
    return stage


def _check_is_run_folder(folder: Path) -> None:
    others = sorted(
        file.name
        for file in folder.glob("*")
        if file.name not in _INITIAL and not file.name.startswith(store.TEMPORARY_PREFIX)
    )
    if others and not (folder / RECIPE_FILE).is_file():
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"hydra.run.dir is {folder}, but it holds {listed} and no {RECIPE_FILE}: "
            "choose an empty folder, or the folder of a run"
        )


def _check_version(folder: Path, stage: Stages) -> None:
    """Raise UserError if training would continue from checkpoints of another version."""
    if stage.version == VERSION or stage.done("student"):
        return
    if any((folder / "checkpoints").rglob("step-*.ckpt")):
        raise UserError(
            f"resume is {folder}, but its checkpoints have version {stage.version}, and this "
            f"distill continues version {VERSION} only: finish the run with the distill that "
            "started it, or start a new run"
        )
    stage.version = VERSION


def check_same_examples(source: str | None, stage: Stages, fingerprint: str) -> None:
    """Raise UserError if the examples differ from those that the run started with."""
    if stage.results.setdefault("examples", fingerprint) != fingerprint:
        raise UserError(
            f"data.source is {source}, but its examples are not those with which the run "
            "started: restore them, or start a new run"
        )


def differences(earlier: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """The keys that differ between two recipes, or sections of recipes, with both values."""
    before, after = (_flat("", asdict(run)) for run in (earlier, now))
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(f"{prefix}.{name}" if prefix else str(name), part).items()
    }


def _stages_to_repeat(folder: Path, changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """The stages to repeat after these changes; UserError if they change the results."""
    stages = {key: _repeated_by(key, *values) for key, values in changed.items()}
    harmful = [_describe(key, changed[key]) for key, names in stages.items() if names is None]
    if harmful:
        raise UserError(
            f"resume is {folder}, but its run started with another recipe, and these keys change "
            f"its results: {', '.join(harmful)}: restore them, or start a new run"
        )
    if changed:
        described = ", ".join(_describe(key, values) for key, values in changed.items())
        log.info("the recipe has changed: %s", described)
    return [name for name in _AFTER_TEACHER if any(name in (s or ()) for s in stages.values())]


def _repeated_by(key: str, before: Any, now: Any) -> tuple[str, ...] | None:
    """The stages that a change of this key repeats, None if the change is not allowed."""
    if key in _LENGTHS:
        longer = before is not None and now is not None and now > before
        return _AFTER_TEACHER if longer else None
    if key in _SERVERS:
        return None if before is None or now is None else ()
    return next((stages for prefix, stages in _HARMLESS.items() if key.startswith(prefix)), None)


def _describe(key: str, values: tuple[Any, Any]) -> str:
    before, now = ("null" if value is None else value for value in values)
    return f"{key} was {before} and is {now}"
