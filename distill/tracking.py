"""Loggers: metrics.csv always; Weights & Biases beside it, which never asks a question and never stops a run."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, WandbLogger

from distill import config

log = logging.getLogger(__name__)

UNREACHABLE_AFTER = 20  # seconds


class Tracker:
    """One Weights & Biases run for all stages of one of ours, or none."""

    def __init__(self, run: config.Run, folder: Path) -> None:
        self.folder = folder
        self.run = start(run, folder)

    def loggers(self, stage: str) -> list[Any]:
        """`logs/<stage>/metrics.csv`, and the same figures as `<stage>/...` on the Weights & Biases run."""
        loggers: list[Any] = [CSVLogger(self.folder, name="logs", version=stage)]
        if self.run is not None:
            loggers.append(WandbLogger(experiment=self.run, prefix=stage, log_model=False))
        return loggers

    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


def start(run: config.Run, folder: Path) -> Any:
    """A Weights & Biases run in the recipe's mode, offline where the server does not answer."""
    wanted = mode(run.tracking.wandb)
    if wanted == "disabled":
        return None
    import wandb

    def begin(mode: Literal["online", "offline"]) -> Any:
        settings = wandb.Settings(init_timeout=UNREACHABLE_AFTER, silent=True)
        name = f"{run.name}/{folder.name}"
        return wandb.init(project=run.tracking.project, name=name, dir=folder, mode=mode, config=asdict(run), settings=settings)

    if wanted == "online":
        try:
            return begin("online")
        except (wandb.Error, OSError) as error:
            said = " ".join(str(error).split())[:200]
            log.warning("wandb did not answer within %d s (%s): this run is tracked offline", UNREACHABLE_AFTER, said)
            wandb.teardown()
    return begin("offline")


def mode(wanted: str) -> str:
    """WANDB_MODE where it is set, else the recipe's; `auto` is online only for a user who is logged in."""
    wanted = os.environ.get("WANDB_MODE") or wanted
    wanted = {"dryrun": "offline", "run": "online"}.get(wanted, wanted)  # what older versions called them
    if wanted in ("disabled", "offline"):
        return wanted
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error:
        logged_in = False
    if not logged_in and wanted == "online":
        log.warning("tracking.wandb is online, but nobody is logged in: this run is tracked offline; `wandb login` before the next")
    return "online" if logged_in else "offline"
