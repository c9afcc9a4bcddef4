"""Checkpoints are complete or absent; a full disk and a request to stop lose nothing."""

import errno
import json
import logging
import os
import pickle
import resource
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from distill import store
from distill.errors import RunFailed, UserError
from distill.processes import signals
from distill.recipe import config
from distill.training import checkpoint_files, checkpoint_writer, checkpoints, loop
from distill.training.checkpoint_files import checkpoint_path, newest_intact, prune
from distill.training.checkpoint_writer import AtomicCheckpointIO, snapshot
from tests.unit.test_module import module_of
from tests.worlds import world


def saved(folder, *steps, best=None):
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        write({"weights": torch.arange(100.0) + step, checkpoint_files.BEST: best}, folder, step)
    return folder


def write(state, folder, step, **options):
    """Save a checkpoint and wait until it is written."""
    writer = AtomicCheckpointIO(**options)
    try:
        writer.save_checkpoint(state, checkpoint_path(folder, step))
    finally:
        writer.teardown()


def test_what_was_saved_is_loaded(tmp_path):
    saved(tmp_path, 3)
    assert torch.equal(
        AtomicCheckpointIO().load_checkpoint(checkpoint_path(tmp_path, 3))["weights"],
        torch.arange(100.0) + 3,
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "step-00000003.ckpt",
        "step-00000003.json",
    ]


def test_nothing_is_unpickled(tmp_path):
    torch.save({"weights": print}, checkpoint_path(tmp_path, 1))
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(checkpoint_path(tmp_path, 1), weights_only=False)


def flipped(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "empty": lambda file: file.write_bytes(b""),
    "no checksum": lambda file: file.with_suffix(".json").unlink(),
    "half a checksum": lambda file: file.with_suffix(".json").write_text('{"sha'),
    "no object for a checksum": lambda file: file.with_suffix(".json").write_text("[1]"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "no step for the best": lambda file: as_written(file, file.read_bytes(), best_step="x"),
}


def as_written(file, content, **manifest):
    """Give a checkpoint another content, with a checksum that agrees."""
    file.write_bytes(content)
    manifest |= {"sha256": store.sha256(file)}
    file.with_suffix(".json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["step-last.ckpt", "step-12.ckpt", "step-00000013.ckpt.bak"])
def test_other_files_beside_checkpoints_are_left_alone(name, tmp_path):
    saved(tmp_path, 4, 8)
    (tmp_path / name).write_bytes(b"mine")
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 8)
    prune(tmp_path, 1)
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    saved(tmp_path, 4, 8, 12)
    damage(checkpoint_path(tmp_path, 12))
    with caplog.at_level(logging.WARNING):
        assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 8)
    assert [record.getMessage() for record in caplog.records] == [
        f"step-00000012.ckpt in {tmp_path} is damaged: step-00000008.ckpt is used in its place"
    ]


def test_a_checkpoint_whose_best_one_is_damaged_is_of_no_use(tmp_path):
    saved(tmp_path, 4, 8)
    saved(tmp_path, 12, best=8)
    DAMAGE["one bit"](checkpoint_path(tmp_path, 8))
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 4)


def test_without_a_whole_one_training_begins_anew(tmp_path, caplog):
    assert newest_intact(tmp_path / "none") is None
    assert not caplog.records
    DAMAGE["empty"](checkpoint_path(saved(tmp_path, 4), 4))
    assert newest_intact(tmp_path) is None
    assert "starts from the beginning" in caplog.text


def test_the_newest_and_the_best_are_kept(tmp_path):
    saved(tmp_path, 2, 4, 6)
    saved(tmp_path, 8, best=4)
    saved(tmp_path, 10, best=8)
    prune(tmp_path, 2)
    assert sorted(file.stem for file in tmp_path.glob("*.ckpt")) == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
    prune(tmp_path, 1)
    assert sorted(file.stem for file in tmp_path.glob("*.ckpt")) == [
        "step-00000008",
        "step-00000010",
    ]
    assert len(list(tmp_path.iterdir())) == 4


# ---- in the background


class Held:
    """A lock in place of a slow disk: `atomic_file` waits until it is released."""

    def __init__(self, monkeypatch):
        self.released, self.begun, atomic_file = (
            threading.Event(),
            threading.Event(),
            store.atomic_file,
        )

        @contextmanager
        def waiting(file):
            if file.suffix == ".ckpt":
                self.begun.set()
                assert self.released.wait(30)
            with atomic_file(file) as stream:
                yield stream

        monkeypatch.setattr(store, "atomic_file", waiting)


@pytest.fixture
def disk(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.released.set()


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, disk):
    weights, steps = torch.arange(100.0), {"exp_avg": torch.ones(3), "step": [1]}
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weights": weights, "state": steps}, checkpoint_path(tmp_path, 1))
    weights.add_(1)
    steps["exp_avg"].zero_()
    steps["step"].append(2)
    assert not list(tmp_path.glob("*.ckpt"))
    disk.released.set()
    loaded = writer.load_checkpoint(checkpoint_path(tmp_path, 1))
    assert torch.equal(loaded["weights"], torch.arange(100.0))
    assert loaded["state"]["step"] == [1] and loaded["state"]["exp_avg"].tolist() == [1, 1, 1]
    writer.teardown()


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, disk):
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.zeros(3)}, checkpoint_path(tmp_path, 1))
    threading.Timer(0.2, disk.released.set).start()
    writer.save_checkpoint({"weights": torch.zeros(3)}, checkpoint_path(tmp_path, 2))
    assert newest_intact(tmp_path) >= checkpoint_path(tmp_path, 1)
    writer.teardown()
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 2)


def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Each process is killed at another write, and finds what the one before left."""
    saved(tmp_path, 0)
    atomic_file, step = store.atomic_file, 0

    def killed_at(number):
        writes = iter(range(1000))

        @contextmanager
        def killing(file):
            with atomic_file(file) as stream:

                class Stream:
                    def write(self, content):
                        if next(writes) == number:
                            stream.flush()
                            os.kill(os.getpid(), signal.SIGKILL)
                        return stream.write(content)

                yield Stream()

        monkeypatch.setattr(store, "atomic_file", killing)
        saved(tmp_path, step + 1)

    for number in (*range(3), 5, 10, 20, 1000):
        process = os.fork()
        if process == 0:
            killed_at(number)
            os._exit(0)
        was_killed = os.waitpid(process, 0)[1] == signal.SIGKILL
        assert was_killed == (number < 1000)
        step += not was_killed
        newest = newest_intact(tmp_path)
        assert newest == checkpoint_path(tmp_path, step)
        assert AtomicCheckpointIO().load_checkpoint(newest)["weights"][0] == step


def test_older_ones_are_removed_only_once_the_new_one_is_complete(tmp_path, disk):
    disk.released.set()
    saved(tmp_path, 1, 2)
    disk.released.clear()
    disk.begun.clear()
    writer = AtomicCheckpointIO(keep=1)
    writer.save_checkpoint({"weights": torch.zeros(3)}, checkpoint_path(tmp_path, 3))
    assert disk.begun.wait(30)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    disk.released.set()
    writer.teardown()
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["step-00000003.ckpt"]


def test_tensors_that_are_one_stay_one_in_the_copy():
    tied = torch.randn(4, 3)
    rows = tied[1:]
    copy = snapshot({"a": tied, "b": tied.detach(), "rows": rows, "rest": [tied.T, (tied, 1)]})
    assert copy["a"].data_ptr() == copy["b"].data_ptr() == copy["rest"][1][0].data_ptr()
    assert copy["a"].data_ptr() != tied.data_ptr() and copy["rest"][1][1] == 1
    assert torch.equal(copy["rows"], rows) and torch.equal(copy["rest"][0], tied.T)


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False])
def test_a_copy_of_a_gpu_is_the_state_when_it_was_saved(tmp_path, room, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_has_room", lambda *_: room)
    weights = torch.arange(1e6, device="cuda")
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"a": weights, "b": weights.detach()}, checkpoint_path(tmp_path, 1))
    weights.zero_()
    loaded = writer.load_checkpoint(checkpoint_path(tmp_path, 1))
    assert torch.equal(loaded["a"], torch.arange(1e6)) and loaded["a"].device.type == "cpu"
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    writer.teardown()


# ---- a full disk


@pytest.fixture
def no_room():
    """Files may have 4,000 bytes: the system itself refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_checkpoint_that_does_not_fit_leaves_the_older_ones(tmp_path, no_room):
    saved(tmp_path, 4)
    before = sorted(tmp_path.iterdir())
    no_room()
    with pytest.raises(
        RunFailed,
        match=r"step-00000008\.ckpt cannot be written .*: make room .*00000004\.ckpt is intact",
    ):
        write({"weights": torch.zeros(10_000)}, tmp_path, 8)
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 4)
    assert sorted(tmp_path.iterdir()) == before


def full(file, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- under the Trainer


@pytest.fixture(scope="module")
def small(_module_store):
    return world()


class Ticks(L.Callback):
    """Calls a function when a step ends; records each batch and a random number drawn in it."""

    def __init__(self, step=-1, act=None):
        self.step, self.act, self.seen = step, act, []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.seen.append((batch.inputs["input_ids"].sum().item(), torch.rand(1).item()))

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act()


def fitted(made, folder, callback, steps=10, **settings):
    options = {
        "max_steps": steps,
        "validations": 3,
        "precision": "32-true",
        "accelerator": "cpu",
        "progress": False,
        "accumulate": 2,
    }
    module = module_of(made)
    module.steps = steps
    return loop.fit(
        loop.Training(
            module,
            made.loader(seed=0, accumulate=2),
            made.loader("validation"),
            config.Trainer(**(options | settings)),
            folder,
            callbacks=[callback],
        )
    )


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 4), (signal.SIGINT, 9)]
)
def test_a_request_to_end_is_answered_when_the_step_is_saved(small, tmp_path, number, step):
    whole = Ticks()
    outcome = fitted(small, tmp_path / "whole", whole)
    first, second = Ticks(step, lambda: os.kill(os.getpid(), number)), Ticks()
    handler = signal.getsignal(number)
    with pytest.raises(signals.StopRequested) as stopped:
        fitted(small, tmp_path / "cut", first)
    assert stopped.value.number == number
    assert signal.getsignal(number) is handler
    assert newest_intact(tmp_path / "cut") == checkpoint_path(tmp_path / "cut", step)
    assert fitted(small, tmp_path / "cut", second) == outcome
    assert (
        first.seen[: 2 * step] + second.seen == whole.seen
    )  # the batch at which it ended comes again


def test_an_ended_training_is_not_trained_again(small, tmp_path):
    outcome = fitted(small, tmp_path, Ticks())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("step-*")}
    again = Ticks()
    assert fitted(small, tmp_path, again) == outcome
    assert again.seen == []
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("step-*")} == before


def test_a_training_that_lost_patience_is_not_gone_on_with(small, tmp_path):
    settings = {"steps": 30, "validations": 30, "patience": 1}
    whole, again = Ticks(), Ticks()
    outcome = fitted(small, tmp_path, whole, **settings)
    assert len(whole.seen) < 60
    assert fitted(small, tmp_path, again, **settings) == outcome
    assert again.seen == []


@pytest.mark.parametrize("first", [6, 30])  # in the middle of an epoch of 30 steps, and at its end
def test_a_longer_training_goes_on_where_the_shorter_ended(small, tmp_path, first):
    whole, begun, longer = Ticks(), Ticks(), Ticks()
    fitted(small, tmp_path / "whole", whole, steps=36)
    fitted(small, tmp_path / "cut", begun, steps=first)
    fitted(small, tmp_path / "cut", longer, steps=36)
    assert begun.seen + longer.seen == whole.seen


@pytest.fixture
def steps(monkeypatch):
    """At which steps checkpoints are taken."""
    steps, save = [], AtomicCheckpointIO.save_checkpoint

    def noted(self, made, path, storage_options=None):
        steps.append(made["global_step"])
        save(self, made, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noted)
    return steps


def test_training_goes_on_while_a_checkpoint_is_written(small, tmp_path, disk):
    reached = []

    def release():
        reached.append(newest_intact(tmp_path))
        disk.released.set()

    fitted(small, tmp_path, Ticks(6, release))  # the first is taken after step 4
    assert disk.begun.is_set() and reached[0] is None
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 10)


def test_a_request_to_end_waits_for_the_checkpoint(small, tmp_path, disk):
    def stop():
        threading.Timer(0.3, disk.released.set).start()
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(signals.StopRequested):
        fitted(small, tmp_path, Ticks(2, stop))
    assert newest_intact(tmp_path) == checkpoint_path(tmp_path, 2)


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def test_picking_the_best_reads_no_optimizer_state(tmp_path):
    state = {"state_dict": {"w": torch.ones(10)}, "optimizer_states": torch.zeros(10_000_000)}
    write(state, tmp_path, 1)
    before = bytes_read()
    assert torch.equal(loop._state_dict(tmp_path, 1)["w"], torch.ones(10))
    assert bytes_read() - before < 1_000_000  # of 40 MB


def test_checkpoints_come_by_steps_and_after_each_look(small, tmp_path, steps):
    fitted(small, tmp_path, Ticks(), checkpoint=config.Checkpoint(steps=3, minutes=None))
    assert steps == [3, 4, 7, 8, 10]  # looks: 4, 8, 10


def test_checkpoints_come_by_time(small, tmp_path, steps, monkeypatch):
    clock = iter(range(0, 100_000, 45))  # seconds between any two looks at it
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    fitted(small, tmp_path, Ticks(), validations=1, checkpoint=config.Checkpoint(minutes=2))
    assert steps == [2, 5, 8, 10]


def test_a_full_disk_in_training_is_one_sentence(small, tmp_path, monkeypatch):
    def fill():
        while not list(tmp_path.glob("step-00000004.json")):  # written by a thread
            time.sleep(0.01)
        monkeypatch.setattr(store, "write_file", full)

    with pytest.raises(
        RunFailed,
        match=r"cannot be written \(No space left on device\).*step-00000004\.ckpt is intact",
    ):
        fitted(small, tmp_path, Ticks(7, fill))
    monkeypatch.undo()
    whole = fitted(small, tmp_path / "whole", Ticks())
    assert fitted(small, tmp_path, Ticks()) == whole


def half(file):
    torch.save({"state_dict": {"student.x": torch.ones(3)}, "global_step": 2}, file)
    return file.read_bytes()


@pytest.mark.parametrize(
    "content",
    [lambda file: pickle.dumps(print), lambda file: b"PK\x03\x04 no checkpoint", half],
    ids=["code", "another file", "another model"],
)
def test_a_checkpoint_of_another_training_is_one_sentence(content, small, tmp_path):
    fitted(small, tmp_path, Ticks(), steps=2)
    file = checkpoint_files.newest(tmp_path)
    as_written(file, content(file))
    with pytest.raises(UserError, match=rf"{file.name} .*delete it") as caught:
        fitted(small, tmp_path, Ticks(), steps=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError(errno.EIO, "broken")])
def test_a_lack_of_memory_is_not_blamed_on_the_checkpoint(error, small, tmp_path):
    def fail(*_):
        raise error

    fitted(small, tmp_path, Ticks(), steps=2)
    callback = Ticks()
    callback.on_fit_start = fail
    with pytest.raises(type(error), match=str(error.args[-1])):
        fitted(small, tmp_path, callback, steps=4)
