"""The files of checkpoints: `step-00000012.ckpt`, with a checksum beside each in a `.json`."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from distill import store

__all__ = [
    "BEST",
    "checkpoint_path",
    "newest",
    "newest_first",
    "newest_intact",
    "prune",
    "remove",
    "step_of",
]

log = logging.getLogger("distill")

NAME = re.compile(r"step-\d{8,}\.ckpt")
BEST = "best_step"  # key of a checkpoint: the step of the best checkpoint so far


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(file: Path) -> int:
    """The step of a checkpoint's file."""
    return int(file.stem.removeprefix("step-"))


def newest(folder: Path) -> Path:
    """The checkpoint that was taken last."""
    return newest_first(folder)[0]


def newest_intact(folder: Path) -> Path | None:
    """The newest undamaged checkpoint whose best one is undamaged too; None if there is none."""
    damaged, intact = [], None
    for file in newest_first(folder):
        if _is_intact(file):
            intact = file
            break
        damaged.append(file.name)
    if damaged:
        instead = "training starts from the beginning"
        if intact is not None:
            instead = f"{intact.name} is used in its place"
        log.warning("%s in %s is damaged: %s", " and ".join(damaged), folder, instead)
    return intact


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best ones that they refer to."""
    files = newest_first(folder)
    newest_files = files[:keep]
    steps = [_read_manifest(file).get(BEST) for file in newest_files]
    best = {checkpoint_path(folder, step) for step in steps if step is not None}
    for file in files:
        if file not in newest_files and file not in best:
            remove(file)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; other files there are left alone."""
    named = (file for file in folder.glob("step-*.ckpt") if NAME.fullmatch(file.name))
    files = (file for file in named if file.is_file())
    return sorted(files, key=step_of, reverse=True)


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_intact(file: Path) -> bool:
    """Whether a checkpoint is what was written, and so is the best one that it refers to."""
    best = _read_manifest(file).get(BEST)
    if best is None or not _is_as_written(file):
        return best is None and _is_as_written(file)
    if not isinstance(best, int):
        return False
    other = checkpoint_path(file.parent, best)
    return other == file or _is_as_written(other)


def _is_as_written(file: Path) -> bool:
    try:
        return _read_manifest(file).get("sha256") == store.sha256(file)
    except OSError:
        return False


def remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
