"""Loggers: metrics.csv always, and Weights & Biases, without prompts and offline if need be."""

import csv
import io
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger

from distill import store
from distill.errors import UserError
from distill.processes import ranks
from distill.recipe import config
from distill.recipe.references import hide_in_values

log = logging.getLogger(__name__)

UNREACHABLE_AFTER = 20  # seconds without a response of the server

Row = tuple[int | None, frozenset[str]]  # a step, and the names of the metrics logged at it


class Tracker:
    """The loggers of a run: one Weights & Biases run, or none, for all of its stages.

    Args:
        run: the recipe, which Weights & Biases stores; its section `tracking` decides.
        folder: the run folder.
    """

    def __init__(self, run: config.Run, folder: Path) -> None:
        self.folder = folder
        self.run = None
        if ranks.is_rank_zero():
            name = f"{run.name}/{folder.name}"
            self.run = start_wandb(run.tracking, name, hide_in_values(asdict(run)), folder)

    def loggers(self, stage: str) -> list[Any]:
        """The loggers of a stage on rank zero, none on other ranks.

        They write `logs/<stage>/metrics.csv`, and `<stage>/...` of the Weights & Biases run.
        """
        if not ranks.is_rank_zero():
            return []
        table = CsvLogger(self.folder / "logs" / stage / "metrics.csv")
        if self.run is None:
            return [table]
        known = table.logged_rows()
        wandb = ResumableWandbLogger(known, experiment=self.run, prefix=stage, log_model=False)
        return [table, wandb]

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the results of the run and close it."""
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


class ResumableWandbLogger(WandbLogger):
    """Skips rows that a killed training sent already, because Weights & Biases would keep both.

    Args:
        known: rows that were logged before.
        options: arguments of Lightning's WandbLogger.
    """

    LOGGER_JOIN_CHAR = "/"  # panels are grouped by the prefix before it

    def __init__(self, known: set[Row], **options: Any) -> None:
        super().__init__(**options)
        self.known = known

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if (step, frozenset(metrics)) not in self.known:
            super().log_metrics(metrics, step)


class CsvLogger(Logger):
    """A CSV table with one row per call, which a resumed training continues.

    Lightning's own CSVLogger starts a new file.

    Args:
        file: path of the table.
    """

    name = version = None

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._columns: list[str] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the recipe is in the run folder."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        if row.keys() - set(self._columns):
            self._write([*self._rows(), row])
        else:
            with self.file.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(row)

    def drop_from_step(self, step: int) -> None:
        """Remove the rows of this step and later ones, which will be logged again."""
        rows = [row for row in self._rows() if int(row["step"]) < step]
        if rows:
            self._write(rows)
        else:
            self.file.unlink(missing_ok=True)

    def logged_rows(self) -> set[Row]:
        """The step and the metric names of each row logged so far."""
        return {
            (int(row.pop("step")), frozenset(name for name, value in row.items() if value))
            for row in self._rows()
        }

    def _rows(self) -> list[dict[str, Any]]:
        """All complete rows; a killed process may have left a partial one."""
        if not self.file.is_file():
            return []
        complete, _, _ = self.file.read_text().rpartition("\n")
        return list(csv.DictReader(io.StringIO(complete)))

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._columns = sorted({name for row in rows for name in row})
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns)
        table.writeheader()
        table.writerows(rows)
        store.write_file(self.file, text.getvalue().encode())


# ---- Weights & Biases


def start_wandb(tracking: config.Tracking, name: str, recipe: dict[str, Any], folder: Path) -> Any:
    """Start a Weights & Biases run, offline if the server does not respond.

    Args:
        tracking: mode and project.
        name: name of the run.
        recipe: stored as its configuration.
        folder: the run folder, in which wandb writes its files.

    Returns:
        The run, or None if tracking is disabled.
    """
    mode = resolve_mode(tracking.wandb)
    if mode == "disabled":
        return None
    import wandb

    options: dict[str, Any] = {
        "project": tracking.project,
        "name": name,
        "id": _run_id(folder / "wandb" / "run-id"),
        "resume": "allow",
        "dir": folder,
        "config": recipe,
        "settings": wandb.Settings(init_timeout=UNREACHABLE_AFTER, silent=True),
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", **options)
        except (wandb.Error, OSError) as error:
            log.warning(
                "wandb did not answer within %d s (%s): this run is tracked offline",
                UNREACHABLE_AFTER,
                " ".join(str(error).split())[:200],
            )
            wandb.teardown()
    return wandb.init(mode="offline", **options)


def _run_id(file: Path) -> str:
    """The id of the Weights & Biases run, which is the same after a resume."""
    if not file.is_file():
        store.write_file(file, secrets.token_hex(4).encode())
    return file.read_text().strip()


def check_tracking(tracking: config.Tracking) -> None:
    """Check the environment variables of Weights & Biases, unless it is disabled.

    Raises:
        UserError: wandb refuses one.
    """
    if (os.environ.get("WANDB_MODE") or tracking.wandb) == "disabled":
        return
    import wandb

    try:
        wandb.setup()
    except Exception as error:
        raise UserError(_explain_wandb(error)) from error


def _explain_wandb(error: Exception) -> str:
    """The variable that wandb refuses, if its error tells."""
    start, reason = "the environment has WANDB_...", str(error)
    details = getattr(error, "errors", None)  # of pydantic, which says where
    if callable(details) and (first := details()[0]).get("loc"):
        variable, reason = f"WANDB_{str(first['loc'][0]).upper()}", first["msg"]
        start = f"{variable} is {os.environ.get(variable) or 'empty'}"
    return (
        f"{start}, but wandb refuses it ({' '.join(reason.split())[:200]}): correct the variable, "
        "unset it, or set tracking.wandb=disabled"
    )


def resolve_mode(mode: str) -> str:
    """The mode of Weights & Biases: WANDB_MODE if it is set, or else the recipe's.

    `auto` is online for a user who is logged in, and offline for others.
    """
    mode = os.environ.get("WANDB_MODE") or mode
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # names of older versions
    if mode in ("disabled", "offline"):
        return mode
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error as error:
        log.warning("%s: this run is tracked offline", " ".join(str(error).split())[:200])
        return "offline"
    if not logged_in and mode == "online":
        log.warning(
            "tracking.wandb is online, but nobody is logged in: this run is tracked offline; "
            "run `wandb login` before the next"
        )
    return "online" if logged_in else "offline"
