import csv
import logging
import time

import pytest

from distill.training import loggers
from tests.worlds import tiny, world


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    """A user without any key, and nobody to ask."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


@pytest.mark.parametrize("wanted", ["auto", "online", "offline"])
def test_without_a_login_a_run_is_tracked_offline(logged_out, wanted):
    assert loggers.resolve_mode(wanted) == "offline"


def test_the_environment_wins(logged_out, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert loggers.resolve_mode("online") == "disabled"


def test_an_offline_run_is_written_into_the_run_folder(logged_out, tmp_path):
    run = tiny(tracking={"wandb": "offline"})
    tracker = loggers.Tracker(run, tmp_path)
    assert [type(logger).__name__ for logger in tracker.loggers("student")] == [
        "CsvLogger",
        "ResumableWandbLogger",
    ]
    tracker.finish({"student": {"quality": {"accuracy": 0.5}}})
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_server_that_does_not_answer_stops_nothing(logged_out, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(loggers, "UNREACHABLE_AFTER", 2)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = loggers.Tracker(tiny(tracking={"wandb": "online"}), tmp_path)
    assert time.monotonic() - start < 60
    assert "tracked offline" in caplog.text
    assert tracker.run is not None
    tracker.finish({})


def test_the_csv_holds_every_named_part(tmp_path):
    made = world(teacher={"outputs": "online"})
    from tests.unit.test_student import distilled

    distilled(made, tmp_path)
    with (tmp_path / "logs" / "student" / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    parts = {"train/loss", "train/supervised", "train/divergence", "train/lr", "train/grad_norm"}
    assert parts | {"val/accuracy", "val/nll", "step"} <= columns
