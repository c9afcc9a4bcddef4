"""`trainer.devices=2`: one run, one log, one error message, and the student of one process."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import data, teacher
from distill.processes import ranks
from distill.teacher_outputs import output_cache
from tests.integration.commands import assert_one_sentence, call, run_folders, start
from tests.processes import on_ranks
from tests.worlds import world

pytestmark = pytest.mark.slow

SMALL = (
    "{model_type: bert, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 4, "
    "intermediate_size: 64, "
)
WITHOUT_DROPOUT = SMALL + "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
FAST = [
    "recipe=tiny",
    "evaluate.bootstrap=20",
    "evaluate.requests=2",
    "evaluate.batches=1",
    "teacher.finetune.epochs=1",
]
STEPS = [
    "trainer.max_steps=12",
    "trainer.validations=2",
    "trainer.precision=32-true",
    "data.batch_size=50",
]
ROUNDING = 1e-4  # of weights after steps of 1e-3
SHORT = [*FAST, *STEPS, f"teacher.config={WITHOUT_DROPOUT}"]
CPU = ["trainer.accelerator=cpu"]
PAIR = ["trainer.devices=2", *CPU]
SPLIT = [*PAIR, "trainer.strategy=fsdp"]
LONG = [*FAST, *PAIR, "trainer.epochs=300", "export.format=null"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("alone"), *SHORT, *CPU, "trainer.accumulate=3")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """480 examples in batches of 50, and 30 in the last one: the ranks have unequal parts.

    Micro-batches have 17, 17 and 16 examples, or 10.
    """
    return ran(tmp_path_factory.mktemp("pair"), *SHORT, *PAIR, "trainer.accumulate=3")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("split"), *SHORT, *SPLIT, "trainer.accumulate=3")


@pytest.fixture(scope="module")
def several(request):
    return request.getfixturevalue(request.param)


EITHER = pytest.mark.parametrize("several", ["pair", "split"], indirect=True)


def ran(cwd, *arguments, **environment):
    code, out, err = call(
        "train", *arguments, cwd=cwd, DISTILL_CACHE=str(cwd / "store"), **environment
    )
    assert code == 0, err
    (folder,) = run_folders(cwd)
    return folder, out, err


def rows(folder, stage="student"):
    with (folder / "logs" / stage / "metrics.csv").open() as stream:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]


# ---- one run


@EITHER
def test_two_processes_are_one_run_with_one_log(several):
    folder, out, err = several
    log = (folder / "train.log").read_text()
    for stage in ("data", "teacher", "cache", "student", "evaluate", "export"):
        assert err.count(f"── {stage} ") == log.count(f"── {stage} ") == 1
    assert out.count("ratio") == 1
    assert "Warning" not in err and "recommended" not in err and "Traceback" not in err
    steps = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert not list(folder.parents[2].rglob(".writing*"))
    assert len(list(folder.parent.iterdir())) == 1


@EITHER
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_the_models_are_those_of_one_process_within_rounding(alone, several, model):
    assert 0 < apart(alone[0], several[0], model) < ROUNDING


def apart(one, other, model="student"):
    """The largest difference of any weight."""
    one, other = (load_file(folder / model / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@EITHER
def test_losses_and_metrics_are_those_of_one_process(alone, several):
    assert_same_losses(alone[0], several[0])
    quality = [
        json.loads((folder / "metrics.json").read_text())["student"]["quality"]
        for folder, *_ in (alone, several)
    ]
    assert quality[0].keys() == quality[1].keys()


def assert_same_losses(folder, other):
    for stage in ("teacher", "student"):
        for one, two in zip(rows(folder, stage), rows(other, stage), strict=True):
            assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_sharded_models_are_not_compressed(tmp_path):
    prune = ["callbacks.prune._target_=distill.callbacks.PruneHeads", "callbacks.prune.amount=0.5"]
    code, _, err = call("train", *FAST, *SPLIT, *prune, cwd=tmp_path)
    assert code == 2
    assert_one_sentence(err, "trainer.strategy is fsdp", "callbacks.prune")


# ---- resumed


KILLS = """
import os, signal
from lightning.pytorch.callbacks import Callback

class Kills(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7 and "KILL" in os.environ and trainer.max_steps == 12:
            os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = {
    "ddp": (PAIR, PAIR),
    "fsdp": (SPLIT, SPLIT),
    "fsdp, then ddp": (SPLIT, PAIR),
    "two, then one": (PAIR, ["trainer.devices=1"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_goes_on_with_as_many_processes_or_with_others(
    case, alone, pair, split, tmp_path
):
    first, second = RESUMED[case]
    (tmp_path / "kills.py").write_text(KILLS)
    options = [
        "trainer.accumulate=3",
        "trainer.checkpoint.steps=2",
        "callbacks.kills._target_=kills.Kills",
        "hydra.run.dir=mine",
    ]
    environment = {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "DISTILL_CACHE": str(tmp_path / "store"),
    }
    code, _, _ = call("train", *SHORT, *first, *options, cwd=tmp_path, **environment, KILL="1")
    assert code == 137
    other = (
        []
        if second is first
        else [
            argument
            for argument in second
            if argument.startswith(("trainer.devices", "trainer.strategy"))
        ]
    )
    other += ["trainer.strategy=ddp"] if case == "fsdp, then ddp" else []
    code, _, err = call("train", "resume=mine", *other, cwd=tmp_path, **environment)
    assert code == 0, err
    # The checkpoint of step 6 is complete only if its thread was faster than the kill.
    assert re.search(r"resuming from mine/checkpoints/step-0000000[46]\.ckpt", err), err
    assert "── teacher" in err
    if second is first:
        assert apart({"ddp": pair, "fsdp": split}[case][0], tmp_path / "mine") == 0
    else:
        assert 0 < apart(alone[0], tmp_path / "mine") < ROUNDING
        assert_same_losses(alone[0], tmp_path / "mine")


def test_torchrun_needs_no_folder_and_makes_one(tmp_path, alone):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "distill.train",
    ]
    environment = os.environ | {"DISTILL_CACHE": str(tmp_path / "store")}
    done = subprocess.run(
        [*command, *SHORT, *CPU, "export.format=null"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = run_folders(tmp_path)
    assert len(list(folder.parent.iterdir())) == 1
    assert (folder / "train.log").read_text().count("── student ") == 1
    assert (folder / "student" / "model.safetensors").is_file()


def test_a_sweep_over_several_devices_is_refused(tmp_path):
    code, _, err = call("train", "-m", *FAST, *PAIR, "loss.alpha=0.2,0.8", cwd=tmp_path)
    assert code == 2
    assert_one_sentence(err, "trainer.devices is 2", "sweep")


# ---- the teacher's outputs


def filled(folder):
    """The fingerprints and the bytes of a cache that all ranks write, in many chunks."""
    os.environ["DISTILL_CACHE"] = str(folder / "store")
    with ranks.rank_zero_first():
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
        model = {"model_type": "bert", "num_attention_heads": 2, **shape}
        made = world(teacher={"config": model, "outputs": "cached"})
    output_cache.CHUNK_EXAMPLES, model = 37, made.model().eval()
    cached = teacher.with_outputs(made.run, made, model).examples["train"]
    output_cache.write_outputs = None  # the second time nothing is computed
    again = teacher.with_outputs(made.run, made, model).examples["train"]
    (file,) = (folder / "store").rglob("outputs.arrow")
    return [data.fingerprint(each) for each in (cached, again)], file.read_bytes()


def test_the_cache_is_computed_once_and_its_bytes_do_not_depend_on_the_ranks(tmp_path):
    alone = on_ranks(filled, tmp_path / "1", 1)
    together = on_ranks(filled, tmp_path / "3", 3)
    assert [file for _, file in together] == [alone[0][1]] * 3
    assert not list((tmp_path / "3").rglob(".writing*"))


# ---- ends


FAILS = """
from lightning.pytorch.callbacks import Callback
from distill.errors import UserError

class Fails(Callback):
    def __init__(self, rank): self.rank = rank
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 5 and trainer.global_rank == self.rank:
            raise UserError("callbacks.fails is here, but the run must fail: take it out")
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_one_rank_failing_ends_the_run_with_its_sentence(rank, pair, tmp_path):
    (tmp_path / "failing.py").write_text(FAILS)
    spec = ["callbacks.fails._target_=failing.Fails", f"callbacks.fails.rank={rank}"]
    code, _, err = call(
        "train",
        *LONG,
        *spec,
        cwd=tmp_path,
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert code == 2
    assert_one_sentence(err, "callbacks.fails is here")
    assert err.count("callbacks.fails is here") == 1


def processes(start):
    """The ids of a process and of all its descendants."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    parents = {
        int(pid): int(parent)
        for pid, parent, state in map(str.split, listed.splitlines())
        if not state.startswith("Z")
    }
    family = {start} & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def running(numbers):
    states = {number: Path(f"/proc/{number}/status") for number in numbers}
    return {
        number
        for number, file in states.items()
        if file.exists() and "\nState:\tZ" not in file.read_text()
    }


@pytest.mark.parametrize("killed", ["rank 0", "rank 1", "launcher"])
def test_killing_any_process_leaves_none(killed, tmp_path):
    process = start("train", *LONG, "data.workers=1", cwd=tmp_path)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "training the student" in line:
            break
    time.sleep(3)
    family = processes(process.pid)
    by_rank = {
        rank_of(number): number for number in sorted(family - {process.pid}, reverse=True)
    }  # a rank is older than its workers
    assert len(family) >= 5 and by_rank.keys() == {"rank 0", "rank 1"}, (family, lines)
    os.kill(process.pid if killed == "launcher" else by_rank[killed], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    for _ in range(100):
        if not running(family):
            break
        time.sleep(0.2)
    assert running(family) == set()
    if killed != "launcher":
        assert process.returncode == 137
        # Only rank zero's stderr is shown, where a data worker may report that its parent is gone.
        shown = err.strip().splitlines()[-1] if killed == "rank 0" else err
        assert_one_sentence(shown, f"{killed} was ended by SIGKILL")


def rank_of(number):
    environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    return next(
        (f"rank {value[5:].decode()}" for value in environment if value.startswith(b"RANK=")), None
    )
