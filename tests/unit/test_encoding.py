"""Splits are encoded in chunks, by several processes, and hashed by their content."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from distill import data
from distill.data import encode_chunks, encoding
from distill.data.encode_chunks import count_processes, map_chunks
from distill.errors import RunFailed
from distill.tasks import SingleLabelClassification
from tests.worlds import LANGUAGE, world

ROWS = Dataset.from_dict({"number": list(range(50)), "text": [f"text {n}" for n in range(50)]})


def doubled(columns):
    return pa.table({"twice": [2 * number for number in columns["number"]]})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_rows(processes):
    rows = ROWS.select(range(49, -1, -1))
    tables = list(map_chunks(rows, doubled, 3, processes))
    assert [table.num_rows for table in tables] == [3] * 16 + [2]
    assert pa.concat_tables(tables)["twice"].to_pylist() == list(range(98, -1, -2))


def test_several_processes_work(tmp_path):
    def process(columns):
        time.sleep(0.05)
        return pa.table({"process": [os.getpid()]})

    processes = {
        number
        for table in map_chunks(ROWS, process, 5, 2)
        for number in table["process"].to_pylist()
    }
    assert len(processes) == 2 and os.getpid() not in processes


def test_an_error_of_a_process_is_raised_here():
    def fails(columns):
        if 20 in columns["number"]:
            raise ValueError("number 20")
        return doubled(columns)

    with pytest.raises(ValueError, match="number 20"):
        list(map_chunks(ROWS, fails, 5, 2))


def test_a_killed_process_is_one_sentence():
    def killed(columns):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunFailed, match="2 processes .* one of them was killed"):
        list(map_chunks(ROWS, killed, 5, 2))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    def waits(columns):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(30)

    parent = os.fork()
    if parent == 0:
        list(map_chunks(ROWS, waits, 5, 2))
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while any(is_alive(file.name) for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_few_rows_are_encoded_in_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert count_processes(1000) == 1
    assert count_processes(1_000_000) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_processes(1_000_000) == 2


@pytest.mark.parametrize("changes", [{}, LANGUAGE], ids=["labels", "language"])
def test_encoded_examples_do_not_depend_on_the_number_of_processes(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "one"))
    one = world(**changes).examples["train"]
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(encode_chunks, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    two = world(**changes).examples["train"]
    files = [Path(split.cache_files[0]["filename"]) for split in (one, two)]
    assert files[0] != files[1] and files[0].read_bytes() == files[1].read_bytes()


# ---- hashes


LISTS = Features({"ids": List(Value("int32")), "text": Value("string")})


def split_of(ids, texts):
    return Dataset.from_dict({"ids": ids, "text": texts}, features=LISTS)


def test_a_hash_does_not_depend_on_how_lists_and_texts_are_stored(tmp_path):
    ids = [[1, 2], [], None, [3]] * 700
    texts = ["a", None, "", "\u00e9"] * 700
    split = split_of(ids, texts)
    split.save_to_disk(tmp_path / "saved")
    longer = concatenate_datasets([split_of([[9]], ["x"]), split])
    same = [
        Dataset.load_from_disk(tmp_path / "saved"),
        longer.select(range(1, len(longer))),
        longer.select(np.arange(1, len(longer))[::-1]).select(range(len(split) - 1, -1, -1)),
        concatenate_datasets([split.select(range(7)), split.select(range(7, len(split)))]),
    ]
    assert {data.fingerprint(each) for each in same} == {data.fingerprint(split)}


def test_a_hash_tells_every_difference():
    splits = [
        split_of([[1, 2], [3]], ["ab", "c"]),
        split_of([[1], [2, 3]], ["ab", "c"]),
        split_of([[1, 2], [3]], ["a", "bc"]),
        split_of([[1, 2], [4]], ["ab", "c"]),
        split_of([[3], [1, 2]], ["c", "ab"]),
        split_of([[1, 2], [3]], ["ab", None]),
        split_of([[1, 2], [3]], ["ab", ""]),
        split_of([[1, 2], None], ["ab", ""]),
        split_of([[1, 2], []], ["ab", ""]),
        split_of([[1, 2], [3], []], ["ab", "c", ""]),
        split_of([], []),
    ]
    assert len({data.fingerprint(split) for split in splits}) == len(splits)


def test_other_types_are_hashed_by_value():
    values = [[True, False], [1.5, None], [{"a": 1}, {"a": 2}], [1, 2], [b"a", b"b"]]
    hashes = {data.fingerprint(Dataset.from_dict({"x": value})) for value in values}
    swapped = {data.fingerprint(Dataset.from_dict({"x": value[::-1]})) for value in values}
    assert len(hashes | swapped) == 10


def test_examples_without_a_label_are_left_out():
    task = SingleLabelClassification()
    split = Dataset.from_dict({"labels": [0, -100, 1], "size": [1, 1, 1]})
    assert encoding.only_labelled(split, task)["labels"][:] == [0, 1]


NAN = float("nan")


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        ([2, -100, 0], Value("int64"), [0, 2]),
        ([0.5, NAN, -3.0], Value("float32"), [0, 2]),
        ([[1.0, 0.0], [NAN, NAN], [0.0, NAN]], List(Value("float32")), [0]),
        ([[1.0], [NAN], [-2.0]], List(Value("float32"), length=1), [0, 2]),
        ([[-100, 3], [-100, -100], [0, 1]], List(Value("int64")), [0, 2]),
        ([[-100, 3, 1], [-100], [0, 1]], List(Value("int64")), [0, 2]),
    ],
    ids=["classes", "numbers", "several", "fixed length", "tokens", "tokens of other lengths"],
)
def test_labelled_rows_are_those_with_a_label(cells, kind, expected):
    split = Dataset.from_dict({"labels": cells}, features=Features({"labels": kind}))
    task = SingleLabelClassification()
    assert data.labelled_rows(split, task).tolist() == expected
    assert data.only_labelled(split, task).num_rows == len(expected)
    order = [2, 1, 0]  # rows of a selection, not of the file
    assert data.labelled_rows(split.select(order), task).tolist() == [
        place for place, row in enumerate(order) if row in expected
    ]
