"""Environment variables of launchers and loggers: right, or one sentence that names one."""

import itertools

import pytest
import wandb

from distill.errors import UserError
from distill.processes import environment
from distill.recipe import config
from distill.training import check_tracking

RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
TASK = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node1",
}
NO_NUMBERS = ("abc", "-1", "1.5", "0x1", "²", "1 2")


@pytest.fixture
def variables(monkeypatch):
    """Replaces all variables that launchers set."""

    def replace(values):
        for name in (*RANK, *TASK):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return replace


@pytest.mark.parametrize(
    "values",
    [
        {},
        RANK,
        TASK,
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"MASTER_ADDR": "somewhere", "MASTER_PORT": "x"},  # of another program
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_what_launchers_set_is_accepted(values, variables):
    variables(values)
    environment.check_variables()


@pytest.mark.parametrize(
    ("complete", "missing"),
    [
        *((RANK, name) for name in RANK),
        *((TASK, name) for name in TASK if name not in ("SLURM_STEP_NUM_TASKS",)),
    ],
)
def test_a_variable_that_is_missing_is_named(complete, missing, variables):
    variables({name: value for name, value in complete.items() if name != missing})
    if missing == "SLURM_STEP_NUM_NODES":  # one node
        environment.check_variables()
        return
    with pytest.raises(UserError, match=rf"\b{missing} is not set|WORLD_SIZE is 2, .*RANK"):
        environment.check_variables()


@pytest.mark.parametrize(
    ("complete", "name", "value"),
    [
        *itertools.product([RANK], [each for each in RANK if each != "MASTER_ADDR"], NO_NUMBERS),
        *itertools.product([TASK], ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"], NO_NUMBERS),
        (RANK, "RANK", "2"),
        (RANK, "LOCAL_RANK", "2"),
        (RANK, "LOCAL_WORLD_SIZE", "3"),
        (RANK, "LOCAL_WORLD_SIZE", "0"),
        (RANK, "WORLD_SIZE", "0"),
        (TASK, "SLURM_STEP_NUM_TASKS", "0"),
        (RANK, "MASTER_PORT", "65536"),
        (RANK, "MASTER_PORT", "0"),
    ],
)
def test_a_value_that_cannot_be_is_named(complete, name, value, variables):
    variables({**complete, name: value})
    with pytest.raises(UserError, match=rf"{name} is {value}|LOCAL_RANK is 1, but") as caught:
        environment.check_variables()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_what_an_earlier_launcher_left_is_named(name, variables):
    variables({name: "3"})
    with pytest.raises(UserError, match=rf"{name} is 3, but RANK is not set"):
        environment.check_variables()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "nonsense"),
        ("WANDB_BASE_URL", "localhost"),
        ("WANDB_BASE_URL", "http://"),
        ("WANDB_SILENT", "perhaps"),
        ("WANDB_INIT_TIMEOUT", "soon"),
        ("WANDB_RESUME", "what"),
    ],
)
def test_a_variable_that_wandb_refuses_is_named(name, value, monkeypatch):
    wandb.teardown()  # what another test has set up would be used again
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is {value}, but wandb") as caught:
        check_tracking(config.Tracking(wandb="auto"))
    assert "\n" not in str(caught.value)


def test_variables_of_a_tracker_that_is_disabled_are_not_looked_at(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "localhost")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_tracking(config.Tracking(wandb="online"))
    monkeypatch.delenv("WANDB_MODE")
    check_tracking(config.Tracking(wandb="disabled"))
