"""Delimiters, quotes, compression and shards: every row is read, or its file is refused."""

import bz2
import csv
import gzip
import io
import logging
import lzma
import random

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from distill import data as pipeline
from distill.data import delimited
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import Regression, SingleLabelClassification

ROWS = [[f"text {row} of some words", ("up", "down")[row % 2]] for row in range(40)]


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("store")))


def lines(rows, header=("text", "label"), delimiter=",", **options) -> str:
    """A file of rows as the csv module writes it."""
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, lineterminator="\n", **options).writerows(
        [header, *rows]
    )
    return stream.getvalue()


def read(path) -> list[list]:
    split = pipeline.open_source(str(path))["train"]
    return [list(row.values()) for row in split]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tab", ".CSV"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_that_of_the_header(suffix, delimiter, tmp_path):
    (tmp_path / f"rows{suffix}").write_text(lines(ROWS, delimiter=delimiter))
    assert read(tmp_path / f"rows{suffix}") == ROWS


def test_delimiters_in_texts_do_not_count(tmp_path):
    rows = [[f"one; two; three {row}", "a"] for row in range(9)] + [["x, y; z", "b"]]
    (tmp_path / "comma.csv").write_text(lines(rows))
    assert read(tmp_path / "comma.csv") == rows
    rows = [[f"one, two {row}", "a"] for row in range(9)] + [["x, y, z", "b"]]
    (tmp_path / "semicolon.csv").write_text(lines(rows, delimiter=";"))
    assert read(tmp_path / "semicolon.csv") == rows
    (tmp_path / "text.csv").write_text(lines([["a; b"], ["c; d"]], header=["text"]))
    assert read(tmp_path / "text.csv") == [["a; b"], ["c; d"]]


@pytest.mark.parametrize("seed", range(10))
def test_random_texts_come_back_as_they_were_written(seed, tmp_path):
    generator = random.Random(seed)
    delimiter = generator.choice(delimited.DELIMITERS)
    words = ["a", "bb", '"', "'", ",", ";", "\t", "|", "\n", "é", "\\", '""', "x,y\nz"]
    rows = [
        [" ".join(generator.choices(words, k=6)), generator.choice(["up", "down"])]
        for _ in range(60)
    ]
    (tmp_path / "rows.csv").write_text(lines(rows, delimiter=delimiter), newline="")
    assert read(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".txt"])
def test_compressed_files_are_read(suffix, compress, kind, tmp_path):
    plain, path = tmp_path / f"rows{kind}", tmp_path / f"rows{kind}{suffix}"
    split = Dataset.from_dict({"text": ["one two", "three"], "label": ["a", "b"]})
    if kind == ".jsonl":
        split.to_json(plain)
    elif kind == ".txt":
        plain.write_text("\n".join(split["text"]))
    else:
        plain.write_text(lines(split.to_pandas().values, delimiter="\t" if "t" in kind else ","))
    path.write_bytes(compress(plain.read_bytes()))
    expected = read(plain)
    plain.unlink()
    assert read(path) == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / f"train{kind}{suffix}")
    assert read(folder) == expected


def test_damaged_compression_is_reported(tmp_path):
    whole = gzip.compress(lines(ROWS * 50).encode())
    for content in (whole[:100], b"no gzip at all"):
        (tmp_path / "rows.csv.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"rows\.csv\.gz cannot be read"):
            read(tmp_path / "rows.csv.gz")


def test_decimal_commas_beside_semicolons_are_numbers(tmp_path):
    rows = [[f"text {row}", f"{row},5"] for row in range(20)]
    (tmp_path / "rows.csv").write_text(lines(rows, delimiter=";"))
    data = Data(source=str(tmp_path / "rows.csv"), validation=None, test=None)
    splits, _ = pipeline.load(data, Regression(), 0)
    numbers = {label for split in splits.values() for label in split["label"]}
    assert numbers == {row + 0.5 for row in range(20)}


# ---- quotes


def broken(rows, opened: int, closed: int | None) -> str:
    """Rows with a quote at the beginning of one text and at an edge of another."""
    written = ["text,label", *(",".join(row) for row in rows)]
    written[opened + 1] = '"' + written[opened + 1]
    if closed is not None:
        written[closed + 1] = '"' + written[closed + 1]
    return "\n".join(written) + "\n"


@pytest.mark.parametrize("closed", [6, 25, None])
def test_a_quote_that_swallows_rows_is_refused_with_its_lines(closed, tmp_path):
    (tmp_path / "rows.csv").write_text(broken(ROWS, 5, closed))
    last = len(ROWS) + 1 if closed is None else closed + 2
    with pytest.raises(UserError, match=rf"line 7 of .*rows\.csv .* line {last}\b"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize(("opened", "closed"), [(3, 4), (3, 9), (0, 39)])
@pytest.mark.parametrize("label_first", [False, True])
def test_well_formed_quotes_that_swallow_rows_are_refused(opened, closed, label_first, tmp_path):
    written = [[*row] for row in ROWS]
    written[opened][0] = '"' + written[opened][0]
    written[closed][0] += '"'
    order = -1 if label_first else 1
    text = "\n".join(",".join(row[::order]) for row in [["text", "label"], *written])
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=rf"from line {opened + 2} to {closed + 2}, but its lines"):
        read(tmp_path / "rows.csv")


def test_texts_of_several_lines_are_texts(tmp_path):
    letters = ["Dear John,\nI said, once more\nyes", "a,b\nc,d\ne,f", "x\n\ny", 'he said "no",\nno']
    rows = [[letters[row % 4] + f" {row}", ("up", "down")[row % 2]] for row in range(40)]
    (tmp_path / "rows.csv").write_text(lines(rows))
    assert read(tmp_path / "rows.csv") == rows


def test_prompts_that_hold_complete_rows_are_refused_where_no_column_recurs(tmp_path):
    rows = [[f"prompt {row}", f"answer {row}"] for row in range(20)]
    rows[3][0], rows[12][1] = '"' + rows[3][0], rows[12][1]
    rows[12][0] += '"'
    text = "\n".join(map(",".join, [["prompt", "completion"], *rows]))
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match="from line 5 to 14"):
        read(tmp_path / "rows.csv")


def test_backslashes_before_quotes_escape_them(tmp_path):
    rows = [[f'he said "{row}", and left', "a"] for row in range(5)]
    (tmp_path / "rows.csv").write_text(lines(rows, doublequote=False, escapechar="\\"))
    assert read(tmp_path / "rows.csv") == rows


def test_quotes_of_a_file_with_tabs_may_be_part_of_the_texts(tmp_path, caplog):
    rows = [['"a quote that is not closed', "up"], ["5 inches", "down"], ['"another', "up"]] * 5
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "\n".join(map("\t".join, rows)))
    with caplog.at_level(logging.INFO, logger="distill"):
        assert read(tmp_path / "rows.tsv") == rows
    assert "rows.tsv has quotes" in caplog.text


def test_rows_with_more_cells_than_the_header_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text\nHello, world\nAnd, again\n")
    with pytest.raises(UserError, match=r"line 2 of .*rows\.csv has 2 cells, but its header has 1"):
        read(tmp_path / "rows.csv")


def test_rows_with_fewer_cells_are_counted(tmp_path, caplog):
    (tmp_path / "rows.csv").write_text("text,label\na,up\nb\nc,down\nd\n")
    assert len(read(tmp_path / "rows.csv")) == 4
    assert "2 rows of" in caplog.text
    assert "the first in line 3" in caplog.text


def test_what_a_large_file_uses_is_stored(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(lines(ROWS, delimiter=";"))
    monkeypatch.setattr(pipeline.sources, "STORED_BYTES", 1)
    assert read(tmp_path / "rows.csv") == ROWS
    monkeypatch.delattr(delimited, "options")
    assert read(tmp_path / "rows.csv") == ROWS


# ---- folders


def write(path, start, stop) -> None:
    rows = Dataset.from_dict({"text": [f"text {row}" for row in range(start, stop)]})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".csv":
        rows.to_csv(path)
    else:
        rows.to_json(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(
    "names",
    [
        [f"train-{shard:05d}-of-00012" for shard in range(12)],
        [f"train-{shard:05d}-of-00002-0123456789abcdef" for shard in range(2)],
        [f"train_{shard}" for shard in range(12)],
        ["train-1", "train-2", "train-3"],
        ["train.00", "train.01"],
        ["train_0"],
    ],
)
def test_shards_are_one_split_in_the_order_of_their_numbers(suffix, names, tmp_path):
    for shard, name in enumerate(names):
        write(tmp_path / f"{name}{suffix}", 2 * shard, 2 * shard + 2)
    write(tmp_path / f"test{suffix}", 0, 1)
    splits = pipeline.open_source(str(tmp_path))
    assert list(splits) == ["test", "train"]
    assert splits["train"]["text"][:] == [f"text {row}" for row in range(2 * len(names))]


def test_a_single_shard_keeps_its_name_too(tmp_path):
    for name in ("train", "test_1", "test_2"):
        write(tmp_path / f"{name}.csv", 0, 3)
    splits = pipeline.open_source(str(tmp_path))
    assert [len(splits[name]) for name in ("train", "test", "test_1", "test_2")] == [3, 6, 3, 3]
    assert "test_3" not in splits


def test_numbers_with_gaps_or_beside_a_file_of_that_name_are_splits(tmp_path):
    for name in ("train", "train_1", "test-2016", "test-2017"):
        write(tmp_path / f"{name}.csv", 0, 3)
    assert set(pipeline.open_source(str(tmp_path))) == {
        "train",
        "train_1",
        "test-2016",
        "test-2017",
    }


def test_missing_shards_are_refused(tmp_path):
    write(tmp_path / "train-00000-of-00003.parquet", 0, 2)
    write(tmp_path / "train-00002-of-00003.parquet", 2, 4)
    with pytest.raises(UserError, match="holds 2 shards of the split train, but .* count 3"):
        pipeline.open_source(str(tmp_path))["train"]


def test_files_beside_the_splits_are_not_opened(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(lines(ROWS))
    (tmp_path / "NOTES.txt").write_text("")
    (tmp_path / "config.json").write_text("{not json")
    (tmp_path / "train_old.csv.bak").write_text("?")
    data = Data(source=str(tmp_path), validation=None)
    splits, _ = pipeline.load(data, SingleLabelClassification(), 0)
    assert len(splits["test"]) == 40
    with pytest.raises(UserError, match=r"NOTES\.txt is empty"):
        pipeline.load(
            Data(source=str(tmp_path), validation="NOTES"), SingleLabelClassification(), 0
        )


def test_texts_beside_a_folder_as_on_the_hub_are_not_opened(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", 0, 3)
    (tmp_path / "LICENSE.txt").write_text("words")
    assert len(pipeline.open_source(str(tmp_path))["train"]) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "folder"])
def test_texts_that_are_no_utf_8_are_refused_by_column(suffix, tmp_path):
    table = Dataset.from_list([{"text": f"text {row} word", "label": row % 2} for row in range(30)])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        table.to_json(path)
    elif suffix == "parquet":
        pq.write_table(table.data.table, path, compression="none", use_dictionary=False)
    else:
        table.save_to_disk(path)
    file = path if path.is_file() else next(path.glob("*.arrow"))
    content = file.read_bytes()
    assert b"17 word" in content
    file.write_bytes(content.replace(b"17 word", b"17 w\xffrd"))
    with pytest.raises(UserError, match="column 'text' of .*UTF-8"):
        pipeline.load(Data(source=str(path)), SingleLabelClassification(), 0)
