"""Collectives, the process group, and the launcher that starts and ends ranks together."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.distributed.elastic.utils.distributed import get_free_port

from distill.errors import RunFailed, UserError
from distill.processes import environment, exits, group, ranks, strategy
from distill.recipe import arguments, config
from tests.processes import ROOT, on_ranks

# ---- one process


def test_a_single_process_is_rank_zero_and_its_collectives_return_their_argument():
    assert (ranks.rank(), ranks.world_size(), ranks.is_rank_zero()) == (0, 1, True)
    assert ranks.all_gather("a") == ["a"] and ranks.broadcast("a") == "a"
    ranks.barrier()
    values = {"a": torch.ones(3)}
    assert ranks.all_reduce_sum(values["a"]) is values["a"] and ranks.all_reduce_sum_by_name(
        values
    ).keys() == {"a"}
    with ranks.rank_zero_first():
        pass
    with pytest.raises(ZeroDivisionError), ranks.rank_zero_first():
        _ = 1 / 0


def test_a_single_process_is_trained_without_ddp(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group.join_process_group(config.Trainer())
    assert strategy.lightning_strategy(config.Trainer(accelerator="cpu")) == {
        "accelerator": "cpu",
        "devices": 1,
    }


# ---- several


def collectives(folder):
    mine = ranks.rank()
    names = {
        "both": torch.tensor([1.0, mine]),
        **({"first": torch.ones(2, 2).double()} if mine == 0 else {}),
    }
    before = names["both"].clone()
    results = {
        "gathered": ranks.all_gather({"rank": mine}),
        "broadcast": ranks.broadcast(f"of {mine}"),
        "sums": ranks.all_reduce_sum_by_name(names),
        "maxima": ranks.all_reduce_max([mine, 5 - mine]),
        "restored": [
            ranks.restore_partial_sums([{"a": torch.tensor(10.0**place)} for place in range(count)])
            for count in (2, 3)
        ],
        "unchanged": bool((names["both"] == before).all()),
        "order": order(folder),
        "alone": alone() if mine == 0 else None,
        "gathered after it": ranks.all_gather(mine),
        "strategy": {
            name: value
            for name, value in strategy.lightning_strategy(
                config.Trainer(accelerator="cpu")
            ).items()
            if name != "strategy"
        },
        "handlers": log_handlers(folder),
    }
    ranks.barrier()
    return results | {"lines": (folder / "log").read_text()}


def order(folder):
    """Whether the file of rank zero exists when this rank begins."""
    with ranks.rank_zero_first():
        exists = (folder / "file").exists()
        time.sleep(0.3 if ranks.is_rank_zero() else 0)
        (folder / "file").touch()
    return exists


def alone():
    """What rank zero sees in code that no other rank runs."""
    with ranks.single_process():
        with ranks.rank_zero_first():
            seen = ranks.world_size(), ranks.all_gather("a"), ranks.broadcast("b")
        ranks.barrier()
    return seen, ranks.world_size()


def log_handlers(folder):
    log = logging.getLogger()
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(folder / "log"))
    if not ranks.is_rank_zero():
        group._silence()
    log.info("logged by %d", ranks.rank())
    return [type(handler).__name__ for handler in log.handlers]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return on_ranks(collectives, tmp_path_factory.mktemp("collectives"), 2)


def test_values_are_gathered_in_the_order_of_the_ranks_and_broadcast_from_rank_zero(both):
    assert all(
        each["gathered"] == [{"rank": 0}, {"rank": 1}] and each["broadcast"] == "of 0"
        for each in both
    )


def test_code_of_one_rank_takes_no_part_in_the_collectives_of_the_others(both):
    assert both[0]["alone"] == ((1, ["a"], "b"), 2)
    assert all(each["gathered after it"] == [0, 1] for each in both)


def test_sums_are_over_all_ranks_and_a_rank_may_lack_a_name(both):
    for each in both:
        assert each["unchanged"]
        assert each["sums"]["both"].tolist() == [2, 1]
        assert torch.equal(each["sums"]["first"], torch.ones(2, 2).double())


def test_maxima_are_over_all_ranks(both):
    assert all(each["maxima"] == [1, 5] for each in both)


def test_saved_sums_go_to_their_ranks_or_in_total_to_rank_zero(both):
    assert [each["restored"][0] for each in both] == [{"a": 1.0}, {"a": 10.0}]
    assert [each["restored"][1] for each in both] == [{"a": 111.0}, {}]


def test_missing_ranks_are_an_error_after_a_timeout(monkeypatch):
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    for name, value in (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | port
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(group, "_RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(
        RunFailed, match=r"WORLD_SIZE is 2, but fewer processes joined .*: start all of them"
    ):
        group.join_process_group(config.Trainer(accelerator="cpu"))


def test_rank_zero_runs_a_block_before_the_others(both):
    assert [each["order"] for each in both] == [False, True]


def test_only_rank_zero_writes_a_log(both):
    assert both[0]["lines"] == "logged by 0\n"
    assert [each["handlers"].count("FileHandler") for each in both] == [1, 0]


def test_lightning_gets_the_number_of_processes(both):
    assert all(
        each["strategy"] == {"accelerator": "cpu", "devices": 2, "num_nodes": 1} for each in both
    )


def test_variables_of_srun_are_read_and_a_batch_script_is_a_single_process(monkeypatch):
    step = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],x1",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "123456",
    }
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    monkeypatch.setattr(environment.os, "environ", variables)
    environment.read_slurm()
    assert "RANK" not in variables
    variables |= step
    environment.read_slurm()
    expected = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }
    assert variables.items() >= expected.items()


def test_nodes_with_different_numbers_of_tasks_are_refused(monkeypatch):
    variables = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NUM_NODES": "2"}
    monkeypatch.setattr(environment.os, "environ", variables)
    with pytest.raises(UserError, match="7 tasks on 2 nodes.*--ntasks-per-node"):
        environment.read_slurm()


# ---- the launcher


def test_processes_are_started_unless_torchrun_or_srun_has(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert environment.processes_to_start(config.Trainer()) == 0
    assert environment.processes_to_start(config.Trainer(devices=3)) == 3
    with pytest.raises(UserError, match="trainer.nodes is 2.*torchrun or srun"):
        environment.processes_to_start(config.Trainer(devices=3, nodes=2))
    for variables in (
        {"RANK": "0"},
        {
            "SLURM_STEP_NUM_TASKS": "6",
            "SLURM_STEP_NODELIST": "node",
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert environment.processes_to_start(config.Trainer(devices=3, nodes=2)) == 0


@pytest.mark.parametrize(
    "path", ["runs/a b/2026-01-01_10-00-00", "it's, [x]={y}\\z", "\\'", "$HOME/ü"]
)
def test_the_name_of_a_folder_passes_the_command_line_of_hydra(path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert (
        OverridesParser.create().parse_override(f"hydra.run.dir={arguments.quote(path)}").value()
        == path
    )


FAKE = """
import os, signal, subprocess, sys, time
from distill.errors import UserError
from distill.processes import exits
exits.exit_with_launcher()
rank = int(os.environ["RANK"])
def say(text): print(text, file=sys.stderr, flush=True)
def fail(message, code=2): exits.report_failure(message); sys.exit(code)
def wait(): time.sleep(600)
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"child{{rank}}", "w").write(str(process.pid))
open(f"pid{{rank}}", "w").write(str(os.getpid()))
def main():
{body}
exits.run_and_exit(main)
"""
START = """
import sys
from pathlib import Path
from distill.processes import launch
launch._GRACE = {grace}
sys.exit(launch.launch("fake", [], 2, Path("train.log")))
"""


def started(folder, body, grace=3.0):
    """The launcher of two processes that run `body`."""
    body = textwrap.indent(textwrap.dedent(body), "    ")
    (folder / "fake.py").write_text(FAKE.format(body=body))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "HYDRA_FULL_ERROR": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", START.format(grace=grace)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("timeout")


def alive(folder):
    """The processes that still run of those that wrote their id to a file here."""
    names = []
    for file in [*folder.glob("pid*"), *folder.glob("child*")]:
        state = Path("/proc", file.read_text(), "stat")
        if state.exists() and state.read_text().split()[2] != "Z":
            names.append(file.name)
    return names


def finished(folder, body):
    process = started(folder, body)
    out, err = process.communicate(timeout=120)
    assert alive(folder) == []
    return process.returncode, out, err


LOSES_CONNECTION = "raise RuntimeError('Connection closed by peer')"


@pytest.mark.parametrize(
    ("failing", "other"),
    [(0, "wait()"), (1, f"time.sleep(0.2); {LOSES_CONNECTION}")],
    ids=["the other waits", "the other loses its connection"],
)
def test_one_rank_failing_ends_all_with_its_sentence(failing, other, tmp_path):
    sentence = "data.label is x, but there is no such column: choose another"
    code, _, err = finished(
        tmp_path,
        f"""
        say('progress')
        child()
        if rank == {failing}: fail({sentence!r})
        {other}
        """,
    )
    assert code == 2
    assert err.splitlines() == ["progress", f"distill: {sentence}"]


def test_an_error_is_recorded_as_elastic_does(tmp_path, monkeypatch):
    recorded = []
    for name in ("ours", "theirs"):
        monkeypatch.setenv(exits.ERROR_FILE, str(tmp_path / name))
        try:
            raise ValueError("seven")
        except ValueError as error:
            exits._record(error) if name == "ours" else ErrorHandler().record_exception(error)
        recorded.append(json.loads((tmp_path / name).read_text())["message"])
    ours, theirs = recorded
    assert ours["message"] == theirs["message"] == "ValueError: seven"
    assert ours["extraInfo"].keys() == theirs["extraInfo"].keys()


def test_a_consequence_that_shows_first_is_not_reported(tmp_path):
    code, _, err = finished(
        tmp_path,
        f"""
        if rank == 0: {LOSES_CONNECTION}
        time.sleep(0.5)
        fail('a is b, but c: d')
        """,
    )
    assert (code, err) == (2, "distill: a is b, but c: d\n")


def test_a_defect_is_one_sentence_and_its_traceback_is_in_the_log(tmp_path):
    code, _, err = finished(
        tmp_path,
        """
        say(f'last line of {rank}')
        if rank == 1: raise ValueError('seven')
        wait()
        """,
    )
    assert code == 1
    first, sentence = err.splitlines()
    assert first == "last line of 0"
    assert sentence.startswith("distill: rank 1 failed with ValueError: seven: ")
    log = (tmp_path / "train.log").read_text()
    assert "Traceback" in log and "last line of 1" in log


def test_the_earlier_of_two_defects_is_reported(tmp_path):
    code, _, err = finished(
        tmp_path, f"if rank == 1: raise ValueError('seven')\ntime.sleep(0.2); {LOSES_CONNECTION}"
    )
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("distill: rank 1 failed with ValueError: seven: ")


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_leaves_no_process(killed, tmp_path):
    code, _, err = finished(
        tmp_path, f"child()\nif rank == {killed}: os.kill(os.getpid(), signal.SIGKILL)\nwait()"
    )
    assert code == 137
    assert f"rank {killed} was ended by SIGKILL" in err


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    process = started(tmp_path, "child()\nwait()")
    until(
        lambda: (
            len(list(tmp_path.glob("child*"))) == 2
            and all(file.read_text() for file in tmp_path.glob("child*"))
        )
    )
    process.kill()
    process.communicate(timeout=60)
    until(lambda: alive(tmp_path) == [])


STOPS = """
received = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: received.append(number))
open(f"ready{rank}", "w").close()
while not received: time.sleep(0.05)
if rank == 0: time.sleep(1.5)  # is still saving: longer than ranks have after a failure
fail(f"received {len(received)} signals", 130 if received == [signal.SIGINT] else 75)
"""


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_request_to_stop_reaches_every_rank_once_and_waits_until_they_have_saved(
    number, expected, tmp_path
):
    process = started(tmp_path, STOPS, grace=0.5)
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (expected, "distill: received 1 signals\n")
    assert alive(tmp_path) == []


def test_a_third_request_kills_ranks_that_do_not_stop(tmp_path):
    process = started(
        tmp_path,
        """
        for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda *_: None)
        open(f"ready{rank}", "w").close()
        while True: time.sleep(0.05)
        """,
    )
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)  # signals that are pending together arrive as one
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.startswith("distill: interrupted: ") and alive(tmp_path) == []


HOLDS = """
import atexit
class Held:
    def __del__(self): say("freed at shutdown")
sys.held = Held()
atexit.register(say, f"rank {rank} leaves")
print("done")
END
"""


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [
        pytest.param(
            *("sys.exit(3 * rank)", 3, "rank 1 failed with exit code 3"), marks=pytest.mark.slow
        ),
        ("1 / (1 - rank)", 1, "ZeroDivisionError"),
    ],
)
def test_a_rank_ends_without_the_shutdown_of_python(end, code, sentence, tmp_path):
    """Threads of gloo may still run: no object is freed, but atexit's functions are called."""
    status, out, err = finished(tmp_path, HOLDS.replace("END", end))
    assert (status, out) == (code, "done\n")
    assert "rank 0 leaves" in err and sentence in err and "freed at shutdown" not in err


def test_success_shows_what_the_first_rank_printed_and_logged(tmp_path):
    code, out, err = finished(tmp_path, "print('table', rank)\nsay(f'log {rank}')")
    assert (code, out, err) == (0, "table 0\n", "log 0\n")
