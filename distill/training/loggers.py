"""Loggers: metrics.csv always; Weights & Biases beside it, which never asks a question and never stops a run."""

import csv
import io
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger

from distill import store
from distill.processes import ranks
from distill.recipe import config

log = logging.getLogger(__name__)

UNREACHABLE_AFTER = 20  # seconds


class Tracker:
    """One Weights & Biases run for all stages of one of ours, or none."""

    def __init__(self, run: config.Run, folder: Path) -> None:
        self.folder = folder
        self.run = start_wandb(run, folder) if ranks.is_rank_zero() else None

    def loggers(self, stage: str) -> list[Any]:
        """`logs/<stage>/metrics.csv`, and the same figures as `<stage>/...` on the Weights & Biases run; the first rank's alone."""
        if not ranks.is_rank_zero():
            return []
        table = CsvLogger(self.folder / "logs" / stage / "metrics.csv")
        return (
            [table]
            if self.run is None
            else [
                table,
                ResumableWandbLogger(
                    table.logged_rows(), experiment=self.run, prefix=stage, log_model=False
                ),
            ]
        )

    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


Row = tuple[int | None, frozenset[str]]  # a step, and the names of what was logged at it


class ResumableWandbLogger(WandbLogger):
    """Weights & Biases, which forgets nothing: what a killed training has logged is not sent again when it comes again."""

    LOGGER_JOIN_CHAR = "/"  # panels are grouped by what stands before it

    def __init__(self, known: set[Row], **options: Any) -> None:
        super().__init__(**options)
        self.known = known

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if (step, frozenset(metrics)) not in self.known:
            super().log_metrics(metrics, step)


class CsvLogger(Logger):
    """A table that a killed and resumed training goes on with: no step is in it twice."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._columns: list[str] = []

    name = version = None

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The recipe is in the run folder."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        if row.keys() - set(self._columns):
            self._write([*self._rows(), row])
        else:
            with self.file.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(row)

    def drop_from_step(self, step: int) -> None:
        """Drop what was logged at this step and later: it is to come again."""
        rows = [row for row in self._rows() if int(row["step"]) < step]
        if rows:
            self._write(rows)
        else:
            self.file.unlink(missing_ok=True)

    def logged_rows(self) -> set[Row]:
        """What was logged so far."""
        return {
            (int(row.pop("step")), frozenset(name for name, value in row.items() if value))
            for row in self._rows()
        }

    def _rows(self) -> list[dict[str, Any]]:
        """All rows but for one that was not written to its end."""
        if not self.file.is_file():
            return []
        whole, _, _ = self.file.read_text().rpartition("\n")
        return list(csv.DictReader(io.StringIO(whole)))

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._columns = sorted({name for row in rows for name in row})
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns)
        table.writeheader()
        table.writerows(rows)
        store.write_file(self.file, text.getvalue().encode())


def start_wandb(run: config.Run, folder: Path) -> Any:
    """A Weights & Biases run in the recipe's mode, offline where the server does not answer."""
    wanted = resolve_mode(run.tracking.wandb)
    if wanted == "disabled":
        return None
    import wandb

    identity = _identity(folder / "wandb" / "run-id")

    def begin(resolve_mode: Literal["online", "offline"]) -> Any:
        settings = wandb.Settings(init_timeout=UNREACHABLE_AFTER, silent=True)
        named: dict[str, Any] = {
            "project": run.tracking.project,
            "name": f"{run.name}/{folder.name}",
            "id": identity,
            "resume": "allow",
        }
        return wandb.init(
            **named, dir=folder, mode=resolve_mode, config=asdict(run), settings=settings
        )

    if wanted == "online":
        try:
            return begin("online")
        except (wandb.Error, OSError) as error:
            said = " ".join(str(error).split())[:200]
            log.warning(
                "wandb did not answer within %d s (%s): this run is tracked offline",
                UNREACHABLE_AFTER,
                said,
            )
            wandb.teardown()
    return begin("offline")


def _identity(file: Path) -> str:
    """Made once for a run folder: a resumed run goes on under it."""
    if not file.is_file():
        store.write_file(file, secrets.token_hex(4).encode())
    return file.read_text().strip()


def resolve_mode(wanted: str) -> str:
    """WANDB_MODE where it is set, else the recipe's; `auto` is online only for a user who is logged in."""
    wanted = os.environ.get("WANDB_MODE") or wanted
    wanted = {"dryrun": "offline", "run": "online"}.get(
        wanted, wanted
    )  # what older versions called them
    if wanted in ("disabled", "offline"):
        return wanted
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error:
        logged_in = False
    if not logged_in and wanted == "online":
        log.warning(
            "tracking.wandb is online, but nobody is logged in: this run is tracked offline; `wandb login` before the next"
        )
    return "online" if logged_in else "offline"
