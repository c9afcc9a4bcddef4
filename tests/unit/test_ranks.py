"""What ranks must agree on, and how they begin and end together."""

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

from distill.errors import RunFailed, UserError
from distill.processes import launch, ranks
from distill.recipe import compose, config
from tests.processes import ROOT, on_ranks

TWO = 2


# ---- one process


def test_a_single_process_is_the_first_and_waits_for_nobody():
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


def test_a_single_process_is_trained_without_replicas(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.join_process_group(config.Trainer())
    assert ranks.lightning_strategy(config.Trainer(accelerator="cpu")) == {
        "accelerator": "cpu",
        "devices": 1,
    }


# ---- several


def agreed(folder):
    mine = ranks.rank()
    names = {
        "both": torch.tensor([1.0, mine]),
        **({"first": torch.ones(2, 2).double()} if mine == 0 else {}),
    }
    before = names["both"].clone()
    answer = {
        "gathered": ranks.all_gather({"rank": mine}),
        "shared": ranks.broadcast(f"of {mine}"),
        "totals": ranks.all_reduce_sum_by_name(names),
        "highest": ranks.all_reduce_max([mine, 5 - mine]),
        "parts": [
            ranks.restore_partial_sums([{"a": torch.tensor(10.0**place)} for place in range(count)])
            for count in (2, 3)
        ],
        "kept": bool((names["both"] == before).all()),
        "order": order(folder),
        "strategy": {
            name: value
            for name, value in ranks.lightning_strategy(config.Trainer(accelerator="cpu")).items()
            if name != "strategy"
        },
        "silence": silence(folder),
    }
    ranks.barrier()
    return answer | {"lines": (folder / "log").read_text()}


def order(folder):
    """What the first does is done when the others begin."""
    with ranks.rank_zero_first():
        there = (folder / "made").exists()
        time.sleep(0.3 if ranks.is_rank_zero() else 0)
        (folder / "made").touch()
    return there


def silence(folder):
    log = logging.getLogger()
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(folder / "log"))
    if not ranks.is_rank_zero():
        ranks._fall_silent()
    log.info("said by %d", ranks.rank())
    return [type(handler).__name__ for handler in log.handlers]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return on_ranks(agreed, tmp_path_factory.mktemp("agreed"), TWO)


def test_values_are_gathered_in_the_order_of_the_ranks_and_shared_by_the_first(both):
    assert all(
        each["gathered"] == [{"rank": 0}, {"rank": 1}] and each["shared"] == "of 0" for each in both
    )


def test_sums_are_over_all_ranks_and_a_rank_may_have_nothing_to_add(both):
    for each in both:
        assert each["kept"]
        assert each["totals"]["both"].tolist() == [2, 1]
        assert torch.equal(each["totals"]["first"], torch.ones(2, 2).double())


def test_what_any_rank_wants_is_what_all_see(both):
    assert all(each["highest"] == [1, 5] for each in both)


def test_saved_sums_are_each_rank_s_own_or_all_the_first_s(both):
    assert [each["parts"][0] for each in both] == [{"a": 1.0}, {"a": 10.0}]
    assert [each["parts"][1] for each in both] == [{"a": 111.0}, {}]


def test_ranks_that_do_not_come_are_not_waited_for_for_ever(monkeypatch):
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch._free_port())}
    for name, value in (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | port
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(
        RunFailed, match=r"WORLD_SIZE is 2, but not as many processes met .*: start all of them"
    ):
        ranks.join_process_group(config.Trainer(accelerator="cpu"))


def test_the_others_find_what_the_first_has_made(both):
    assert [each["order"] for each in both] == [False, True]


def test_only_the_first_writes_a_log(both):
    assert both[0]["lines"] == "said by 0\n"
    assert [each["silence"].count("FileHandler") for each in both] == [1, 0]


def test_lightning_is_told_of_the_processes_that_there_are(both):
    assert all(
        each["strategy"] == {"accelerator": "cpu", "devices": 2, "num_nodes": 1} for each in both
    )


def test_srun_s_variables_are_read_and_a_batch_script_is_no_rank(monkeypatch):
    given = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],x1",
        "SLURM_PROCID": "5",
    }
    given |= {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456"}
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    monkeypatch.setattr(ranks.os, "environ", environment)
    ranks._read_slurm()
    assert "RANK" not in environment
    environment |= given
    ranks._read_slurm()
    read = {
        name: environment[name]
        for name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "GROUP_RANK",
            "MASTER_ADDR",
        )
    }
    assert read == dict(
        RANK="5",
        WORLD_SIZE="8",
        LOCAL_RANK="1",
        LOCAL_WORLD_SIZE="4",
        GROUP_RANK="1",
        MASTER_ADDR="gpu07",
    )  # noqa: C408


# ---- started and ended together


def test_processes_are_started_only_where_nobody_else_has(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launch.processes_to_start(config.Trainer()) == 0
    assert launch.processes_to_start(config.Trainer(devices=3)) == 3
    with pytest.raises(UserError, match="trainer.nodes is 2.*torchrun or srun"):
        launch.processes_to_start(config.Trainer(devices=3, nodes=2))
    for name, value in (("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "6")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert launch.processes_to_start(config.Trainer(devices=3, nodes=2)) == 0


@pytest.mark.parametrize(
    "path", ["runs/a b/2026-01-01_10-00-00", "it's, [x]={y}\\z", "\\'", "$HOME/ü"]
)
def test_a_folder_s_name_passes_hydra_s_command_line(path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert (
        OverridesParser.create()
        .parse_override(f"hydra.run.dir={compose.quote_override(path)}")
        .value()
        == path
    )


FAKE = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from distill import launch
launch.follow()
rank = int(os.environ["RANK"])
def say(text): print(text, file=sys.stderr, flush=True)
def end(code, *lines):
    for line in lines: say(line)
    sys.exit(code)
def wait(): time.sleep(600)
def child(): open(f"child{{rank}}", "w").write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid))
open(f"pid{{rank}}", "w").write(str(os.getpid()))
{body}
"""
START = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from distill import launch
sys.exit(launch.launch("fake", Path("."), 2))
"""


def started(folder, body):
    """The launcher of two processes that do what `body` says."""
    (folder / "fake.py").write_text(FAKE.format(root=str(ROOT), body=textwrap.dedent(body)))
    command = [sys.executable, "-c", START.format(root=str(ROOT))]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        "HYDRA_FULL_ERROR": "0",
    }
    return subprocess.Popen(
        command,
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
    raise AssertionError("it never came")


def alive(folder):
    """Which of the processes that wrote their numbers here still run."""
    found = []
    for file in [*folder.glob("pid*"), *folder.glob("child*")]:
        state = Path("/proc", file.read_text(), "stat")
        if state.exists() and state.read_text().split()[2] != "Z":
            found.append(file.name)
    return found


def finished(folder, body):
    process = started(folder, body)
    out, err = process.communicate(timeout=120)
    assert alive(folder) == []
    return process.returncode, out, err


LOST = [
    "Error executing job with overrides: []",
    "[rank0]: Traceback (most recent call last):",
    "  connection",
]
CONSEQUENCE = repr([*LOST, "[rank0]: RuntimeError: Connection closed by peer", "GLHF!"])[1:-1]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "other",
    ["wait()", f"time.sleep(0.2); end(1, {CONSEQUENCE})"],
    ids=["waits", "loses its connection"],
)
def test_one_rank_failing_ends_all_with_its_sentence(failing, other, tmp_path):
    sentence = "distill: data.label is x, but there is no such column: choose another"
    code, _, err = finished(
        tmp_path, f"say('progress')\nchild()\nif rank == {failing}: end(2, {sentence!r})\n{other}"
    )
    assert code == 2
    assert err.splitlines() == ["progress", sentence]


def test_a_consequence_that_shows_first_is_not_what_is_said(tmp_path):
    code, _, err = finished(
        tmp_path,
        f"if rank == 0: end(1, {CONSEQUENCE})\ntime.sleep(0.5); end(2, 'distill: a is b, but c: d')",
    )
    assert (code, err) == (2, "distill: a is b, but c: d\n")


def test_a_defect_is_one_sentence_and_its_traceback_is_in_the_log(tmp_path):
    code, _, err = finished(tmp_path, "if rank == 1: raise ValueError('seven')\nwait()")
    assert code == 1
    assert err.count("\n") == 1 and err.startswith("distill: rank 1 failed with ValueError: seven")
    assert "Traceback" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("killed", [0, 1])
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
    process.wait()
    until(lambda: alive(tmp_path) == [])


ASKED = """
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(number, lambda number, _: asked.append(number))
open(f"ready{rank}", "w").close()
while not asked: time.sleep(0.05)
if rank == 0: time.sleep(5)  # is still saving: longer than a failed run would be given
end(130 if asked == [signal.SIGINT] else 75, f"distill: asked {len(asked)} times")
"""


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_request_to_end_reaches_every_rank_once_and_waits_until_they_have_saved(
    number, expected, tmp_path
):
    process = started(tmp_path, ASKED)
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (expected, "distill: asked 1 times\n")
    assert alive(tmp_path) == []


LEFT = """
import atexit
class Held:
    def __del__(self): say("torn down")
def main():
    atexit.register(say, f"rank {rank} leaves")
    print("done")
    END
held = Held()
launch.run(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("sys.exit(3 * rank)", 3, ""), ("1 / (1 - rank)", 1, "ZeroDivisionError")],
)
def test_a_rank_ends_before_python_is_torn_down(end, code, said, tmp_path):
    """Around threads of gloo that may still be at work: what is held is not given up, but what was asked for at the exit is done."""
    found, out, err = finished(tmp_path, LEFT.replace("END", end))
    assert (found, out) == (code, "done\n")
    assert "rank 0 leaves" in err and said in err and "torn down" not in err


def test_success_shows_what_the_first_rank_printed_and_logged(tmp_path):
    code, out, err = finished(
        tmp_path, "print('table', rank)\nsay(f'log {rank}')\nif rank: say('distill: a note')"
    )
    assert (code, out, err) == (0, "table 0\n", "log 0\n")
