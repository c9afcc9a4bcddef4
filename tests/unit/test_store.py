import errno
import fcntl
import os
import signal

import pytest

from distill import store
from distill.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "kind" / "entry"
    with store.write_entry(folder) as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "weights").write_bytes(bytes(range(256)))
        (inside / "config").write_text("x")
    return folder


def test_what_was_written_is_intact(folder):
    assert store.is_intact(folder)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "missing", "no manifest", "bad manifest"]
)
def test_a_damaged_entry_is_never_used(folder, damage):
    file, manifest = folder / "deep" / "weights", folder / store.MANIFEST
    content = file.read_bytes()
    {
        "truncated": lambda: file.write_bytes(content[:-1]),
        "flipped": lambda: file.write_bytes(bytes([content[0] ^ 1]) + content[1:]),
        "missing": file.unlink,
        "no manifest": manifest.unlink,
        "bad manifest": lambda: manifest.write_text("{"),
    }[damage]()
    assert not store.is_intact(folder)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_entry_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), store.write_entry(tmp_path / "kind" / "entry") as inside:
        (inside / "half").write_text("x")
        raise interruption
    assert list((tmp_path / "kind").iterdir()) == []


def test_an_entry_is_replaced_only_when_the_new_one_is_whole(folder):
    with pytest.raises(RuntimeError), store.write_entry(folder) as inside:
        (inside / "config").write_text("new")
        raise RuntimeError
    assert (folder / "config").read_text() == "x"


def test_every_ingredient_counts():
    same = {"a": 1, "b": [1, 2]}
    assert store.entry_path("k", same) == store.entry_path("k", {"b": [1, 2], "a": 1})
    others = [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1}]
    assert (
        len(
            {store.entry_path("k", other) for other in [same, *others]}
            | {store.entry_path("l", same)}
        )
        == 5
    )


def test_links_show_the_same_files(folder, tmp_path):
    store.link_tree(folder, tmp_path / "run")
    store.link_tree(folder, tmp_path / "run")  # a second time is no error
    assert store.is_intact(folder)
    assert (tmp_path / "run" / "config").read_text() == "x"


# ---- killed and concurrent writers


def in_another_process(work):
    """The exit status of a process forked from this one, which does `work`."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    def killed():
        with store.write_entry(tmp_path / "kind" / "entry") as inside:
            (inside / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(killed) == signal.SIGKILL
    assert [file.name[:9] for file in (tmp_path / "kind").iterdir()] == [".writing-"]
    with store.write_entry(tmp_path / "kind" / "other"):
        pass
    assert [file.name for file in (tmp_path / "kind").iterdir()] == ["other"]


def test_a_writer_killed_before_it_had_a_lock_leaves_nothing_either(tmp_path):
    (tmp_path / f"{store.TEMPORARY_PREFIX}unlocked").mkdir()
    (tmp_path / f"{store.TEMPORARY_PREFIX}file").write_text("of a writer that may live")
    with store.write_entry(tmp_path / "entry"):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"{store.TEMPORARY_PREFIX}file",
        "entry",
    ]


def test_what_a_living_writer_has_written_so_far_is_left_to_it(tmp_path):
    with store.write_entry(tmp_path / "one") as inside:
        in_another_process(lambda: store.remove_abandoned(tmp_path))
        with store.write_entry(tmp_path / "two") as other:
            (other / "file").write_text("2")
        (inside / "file").write_text("1")
    assert store.is_intact(tmp_path / "one") and store.is_intact(tmp_path / "two")


def test_one_process_at_a_time_works_in_a_run_folder(tmp_path):
    def refused():
        with pytest.raises(UserError, match=f"^the run folder is {tmp_path}, but "):  # noqa: SIM117
            with store.exclusive_access(tmp_path, timeout=0):
                pass
        (tmp_path / "refused").touch()

    with store.exclusive_access(tmp_path):
        in_another_process(refused)
    assert (tmp_path / "refused").exists()
    with store.exclusive_access(tmp_path, timeout=0):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    def killed():
        with store.exclusive_access(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(killed) == signal.SIGKILL
    with store.exclusive_access(tmp_path, timeout=0):
        pass


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with store.exclusive_access(tmp_path), store.write_entry(tmp_path / "entry") as inside:
        (inside / "file").write_text("x")
    assert store.is_intact(tmp_path / "entry")


def test_two_writers_of_one_entry_do_not_disturb_each_other(tmp_path):
    with store.write_entry(tmp_path / "entry") as first:
        (first / "file").write_text("same")
        with store.write_entry(tmp_path / "entry") as second:
            (second / "file").write_text("same")
        read = (tmp_path / "entry" / "file").stat().st_ino
    assert (tmp_path / "entry" / "file").stat().st_ino == read  # somebody may have it open
    assert [file.name for file in tmp_path.iterdir()] == ["entry"]


def test_a_damaged_entry_of_the_same_content_is_replaced(folder):
    (folder / "config").write_text("y")
    with store.write_entry(folder) as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "weights").write_bytes(bytes(range(256)))
        (inside / "config").write_text("x")
    assert store.is_intact(folder)


def test_many_writers_at_once_leave_one_whole_entry(tmp_path):
    def write():
        for round in range(5):
            with store.write_entry(tmp_path / "entry") as inside:
                (inside / "file").write_text(f"{os.getpid() % 2} {round}")

    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert store.is_intact(tmp_path / "entry")
    assert [file.name for file in tmp_path.iterdir()] == ["entry"]


def test_a_second_name_can_be_given_twice(tmp_path):
    (tmp_path / "file").write_text("x")
    store.link_file(tmp_path / "file", tmp_path / "name")
    store.link_file(tmp_path / "file", tmp_path / "name")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "name"]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    store.write_file(tmp_path / "file", b"first")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room"))
    )
    with pytest.raises(OSError, match="no room"):
        store.write_file(tmp_path / "file", b"second")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"first")]
