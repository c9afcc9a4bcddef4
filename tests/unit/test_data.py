"""Sources of every kind give the same splits, defects are reported, texts are tokenized once."""

import errno
import json
import logging
import os
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError

from distill import corpora, store
from distill import data as pipeline
from distill.data import encoding
from distill.data.holdout import largest_remainder
from distill.errors import UserError
from distill.evaluate import evaluate_command
from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import (
    LANGUAGE_TOKENS,
    CausalLanguageModelling,
    MultiLabelClassification,
    Regression,
    SingleLabelClassification,
)

ROWS = {"text": [f"text number {row}" for row in range(20)], "label": ["up", "down"] * 10}
MORE = {"text": [f"other text {row}" for row in range(8)], "label": ["down", "up"] * 4}
HERE = __name__


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("store")))


def made() -> DatasetDict:
    """A source for the tests, by its dotted path."""
    return DatasetDict(
        train=Dataset.from_dict(ROWS),
        validation=Dataset.from_dict(MORE),
        texts=Dataset.from_dict({"text": ["only", "texts"]}),
    )


def wrong() -> int:
    return 3


def write(split: Dataset, path) -> None:
    if path.suffix == ".csv":
        split.to_csv(path)
    elif path.suffix == ".parquet":
        split.to_parquet(path)
    elif path.suffix == ".jsonl":
        split.to_json(path)
    elif path.suffix == ".json":
        split.to_json(path, lines=False)
    else:
        path.write_text("\n".join(split["text"]))


def load_bound(source, task=None, seed=0, **keys):
    """The splits, and the task bound to their labels."""
    keys = {"validation": None, "test": None} | keys
    return pipeline.load(
        Data(source=str(source), **keys), task or SingleLabelClassification(), seed
    )


def load(source, task=None, seed=0, **keys) -> DatasetDict:
    return load_bound(source, task, seed, **keys)[0]


# ---- sources


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_local_file_is_the_training_split(suffix, tmp_path):
    write(Dataset.from_dict(ROWS), tmp_path / f"news{suffix}")
    assert pipeline.open_source(str(tmp_path / f"news{suffix}"))["train"].to_dict() == ROWS


def test_a_text_file_holds_an_example_a_line(tmp_path):
    (tmp_path / "news.txt").write_text("one\n\ntwo\n")
    assert pipeline.open_source(str(tmp_path / "news.txt"))["train"]["text"][:] == [
        "one",
        "",
        "two",
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_holds_a_file_for_each_split(suffix, tmp_path):
    write(Dataset.from_dict(ROWS), tmp_path / f"train{suffix}")
    write(
        Dataset.from_dict({"text": MORE["text"]}), tmp_path / f"test{suffix}"
    )  # splits may differ in their columns
    (tmp_path / "README.md").write_text("Words about them.")
    splits = pipeline.open_source(str(tmp_path))
    assert {name: split.to_dict() for name, split in splits.items()} == {
        "train": ROWS,
        "test": {"text": MORE["text"]},
    }


def test_a_file_is_cached_by_content_and_not_by_name_and_time(tmp_path):
    file = tmp_path / "rows.csv"
    for word in ("old", "new"):
        file.write_text(f"text,label\n{word},a\n")
        os.utime(file, (1, 1))
        assert pipeline.open_source(str(file))["train"]["text"][:] == [word]


def test_a_folder_laid_out_as_on_the_hub_is_cached_by_content(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.csv"
    for word in ("old", "new"):
        file.write_text(f"text,label\n{word},a\n")
        os.utime(file, (1, 1))
        assert pipeline.open_source(str(tmp_path))["train"]["text"][:] == [word]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "denied", "/elsewhere/x"),
    ],
)
def test_an_unwritable_cache_is_not_reported_as_an_error_of_the_source(
    error, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise DatasetGenerationError("generating") from error

    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=rf"^{store.cache_root()} cannot be written \(.*set DISTILL_CACHE"
    ):
        pipeline.open_source(str(tmp_path / "rows.csv"))


def test_a_cache_that_is_a_file_is_reported(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "rows.csv"))
    (tmp_path / "more.csv").write_text("text,label\na,b\n")
    with pytest.raises(
        UserError,
        match=r"rows\.csv cannot be written \(.*more\.csv",
    ):
        pipeline.open_source(str(tmp_path / "more.csv"))


def test_an_unreadable_source_is_reported(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")

    def refuse(path):
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(store, "sha256", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^rows\.csv cannot be read \("):
        pipeline.open_source("rows.csv")


def test_a_folder_saved_by_datasets(tmp_path):
    made().save_to_disk(tmp_path / "several")
    made()["train"].save_to_disk(tmp_path / "one")
    assert list(pipeline.open_source(str(tmp_path / "several"))) == ["train", "validation", "texts"]
    assert pipeline.open_source(str(tmp_path / "one"))["train"].to_dict() == ROWS


def test_a_folder_laid_out_as_on_the_hub_takes_the_place_of_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "news" / "data").mkdir(parents=True)
    for name, rows in (("train", ROWS), ("validation", MORE)):
        Dataset.from_dict(rows).to_parquet(
            tmp_path / "owner" / "news" / "data" / f"{name}-00000-of-00001.parquet"
        )
    monkeypatch.chdir(tmp_path)
    splits = pipeline.open_source("owner/news")
    assert {name: split.to_dict() for name, split in splits.items()} == {
        "train": ROWS,
        "validation": MORE,
    }


def test_a_function_by_its_dotted_path():
    assert pipeline.open_source(f"{HERE}.made")["train"].to_dict() == ROWS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all, but there is no such file or folder"),
        ("missing.csv", r"missing\.csv, but there is no such file or folder"),
        ("./missing", r"\./missing, but there is no such file or folder"),
        ("no_such_module.function", "no_such_module"),
        (f"{HERE}.nothing", f"{HERE}.nothing"),
        (f"{HERE}.ROWS", f"{HERE}.ROWS, but it must be a function"),
        (
            f"{HERE}.wrong",
            "it returned an object of the type int: let it return a datasets.DatasetDict",
        ),
    ],
)
def test_a_missing_source_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        pipeline.open_source(source)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "news.xlsx").write_text("?")
    with pytest.raises(UserError, match=r"news\.xlsx, but .* \.csv"):
        pipeline.open_source(str(tmp_path / "news.xlsx"))
    (tmp_path / "news.csv").write_text("")
    with pytest.raises(UserError, match=r"news\.csv is empty, but it must hold examples"):
        pipeline.open_source(str(tmp_path / "news.csv"))
    (tmp_path / "news.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"news\.jsonl cannot be read \("):
        pipeline.open_source(str(tmp_path / "news.jsonl"))


def test_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"data.source is {tmp_path}, but its files"):
        pipeline.open_source(str(tmp_path))
    for suffix in (".csv", ".jsonl"):
        write(Dataset.from_dict(ROWS), tmp_path / f"train{suffix}")
    with pytest.raises(UserError, match=r"holds train\.csv, train\.jsonl, but the split train"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["owner/news", "news"])
def test_an_unreachable_hub_is_reported_in_one_sentence(source, monkeypatch):
    def unreachable(*_):
        raise ConnectionError(f"Couldn't reach '{source}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError,
        match=rf"data.source is {source} \(small\), but .*Couldn't reach '{source}' on the Hub",
    ):
        pipeline.open_source(source, "small")


def test_a_configuration_of_a_source_without_configurations_is_refused(tmp_path):
    write(Dataset.from_dict(ROWS), tmp_path / "train.csv")
    made().save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "train.csv", tmp_path / "saved", f"{HERE}.made"):
        with pytest.raises(UserError, match=r"data.config is small, but .* has no configurations"):
            pipeline.open_source(str(source), "small")
    with pytest.raises(UserError, match=r"cannot be read .*'small' not found"):
        pipeline.open_source(str(tmp_path), "small")


# ---- columns, cells and texts


def test_words_that_pandas_reads_as_missing_are_texts(tmp_path):
    texts, labels = ["NA", "None", "null", "nan"] * 5, ["None", "NA"] * 10
    write(Dataset.from_dict({"text": texts, "label": labels}), tmp_path / "words.csv")
    splits = load(tmp_path / "words.csv")
    assert sorted(text for split in splits.values() for text in split["text"]) == sorted(texts)
    assert set(splits["train"]["label"]) == {"None", "NA"}


def test_numbers_with_empty_cells_stay_labels(tmp_path):
    (tmp_path / "numbers.csv").write_text(
        "text,label\n"
        + "".join(f"text {row},{'' if row % 3 == 0 else row % 2}\n" for row in range(30))
    )
    splits, task = load_bound(tmp_path / "numbers.csv")
    assert task.names == ("0", "1")
    assert set(splits["train"]["label"]) == {"0", "1", None}
    assert None not in splits["test"]["label"][:]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"text": ["body"]},
            "data.text is body, but .* text, label",
        ),
        (
            {"label": "topic"},
            "data.label is topic, but .* text, label",
        ),
        (
            {"train": "training"},
            "data.train is training, but .* train, validation, texts",
        ),
        (
            {"test": "test"},
            "data.test is test, but .* has the splits .* or null to hold examples out",
        ),
        (
            {"labels": ["up", "left"]},
            "column 'label' of split train of .* is 'down' in row 1, but .* up, left",
        ),
        (
            {"validation": "texts"},
            "data.label is label, but split texts of .* has the columns text",
        ),
    ],
)
def test_missing_splits_columns_and_labels_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load(f"{HERE}.made", **keys)


def test_labels_without_examples_are_logged(caplog):
    load(f"{HERE}.made", labels=["up", "left", "down"])
    assert (
        f"no training example of {HERE}.made is labelled left: the model cannot learn it"
        in caplog.text
    )


def test_a_text_must_be_a_string(tmp_path):
    write(Dataset.from_dict({"text": [1, 2], "label": ["a", "b"]}), tmp_path / "n.csv")
    with pytest.raises(
        UserError,
        match=r"column 'text' of split train of .*n\.csv holds int64, but a text is a string",
    ):
        load(tmp_path / "n.csv")


def test_empty_texts_are_dropped_and_counted_once(tmp_path, caplog):
    texts = [*ROWS["text"], "", "  \n", None]
    write(
        Dataset.from_dict({"text": texts, "label": [*ROWS["label"], "up", "up", "up"]}),
        tmp_path / "gaps.jsonl",
    )
    with caplog.at_level(logging.INFO, logger="distill"):
        splits = load(tmp_path / "gaps.jsonl")
    assert sorted(text for split in splits.values() for text in split["text"]) == sorted(
        ROWS["text"]
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"3 of 23 examples in split train of {tmp_path}/gaps.jsonl are empty and are dropped, "
        "the first in row 20"
    ]


def test_pairs_with_one_empty_side_are_kept_and_counted_once(tmp_path, tokenizer, caplog):
    rows = {
        "a": [*ROWS["text"], "", "x", None],
        "b": [*ROWS["text"], "y", None, " "],
        "label": [*ROWS["label"], "up", "up", "up"],
    }
    write(Dataset.from_dict(rows), tmp_path / "pairs.jsonl")
    keys = {"text": ["a", "b"], "validation": None, "test": None}
    with caplog.at_level(logging.INFO, logger="distill"):
        splits, task = load_bound(tmp_path / "pairs.jsonl", **keys)
    assert sum(map(len, splits.values())) == 22
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 23 pairs in split train of {tmp_path}/pairs.jsonl have one empty side and are kept, "
        "the first in row 20",
        f"1 of 23 examples in split train of {tmp_path}/pairs.jsonl are empty and are dropped, "
        "the first in row 22",
    ]
    assert (
        sum(
            map(len, pipeline.encode(splits, task, tokenizer, Data(source="none", **keys)).values())
        )
        == 22
    )


def test_a_split_of_empty_texts_is_refused(tmp_path):
    write(Dataset.from_dict({"text": ["", " "], "label": ["a", "b"]}), tmp_path / "gaps.jsonl")
    with pytest.raises(UserError, match=r"has 2 rows, but none of them has a text"):
        load(tmp_path / "gaps.jsonl")


def test_a_test_split_without_labels_is_refused(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ROWS["text"], "label": [0, 1] * 10}, features=features),
        test=Dataset.from_dict({"text": ["hidden"], "label": [-1]}, features=features),
    )
    splits.save_to_disk(tmp_path)
    assert set(load(tmp_path)["test"]["label"]) <= {"a", "b"}
    with pytest.raises(
        UserError,
        match=r"data.test is test, but none of its examples has a label",
    ):
        load(tmp_path, test="test")


@pytest.mark.parametrize(
    ("task", "cells"),
    [
        (MultiLabelClassification(), [["a"], ["a", "b"], []]),
        (Regression(), [0.5, 2.0, None]),
        (CausalLanguageModelling(), [9, 8, 7]),
    ],
)
def test_labels_of_other_tasks(task, cells, tmp_path):
    write(
        Dataset.from_dict({"text": [f"text {row}" for row in range(30)], "label": cells * 10}),
        tmp_path / "rows.jsonl",
    )
    splits = load(tmp_path / "rows.jsonl", task)
    if not task.uses_labels:
        assert splits["train"].column_names == ["text"]
    else:
        by_text = {
            text: label
            for split in splits.values()
            for text, label in zip(split["text"], split["label"], strict=True)
        }
        assert [by_text[f"text {row}"] for row in range(30)] == cells * 10


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_several_labels_in_a_string_are_refused(labels, tmp_path):
    write(Dataset.from_dict({"text": ROWS["text"], "label": ["a;b"] * 20}), tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"column .label. .*list"):
        load(tmp_path / "rows.csv", MultiLabelClassification(), labels=labels)


MARKS = {"text": [f"text {row}" for row in range(40)], "a": [1, 0] * 20, "b": [0, 0, 1, 1] * 10}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", [int, bool, float, str])
def test_columns_of_0_and_1_are_several_labels(suffix, kind, tmp_path):
    columns = MARKS | {name: [kind(cell) for cell in MARKS[name]] for name in "ab"}
    write(Dataset.from_dict(columns), tmp_path / f"rows{suffix}")
    splits, task = load_bound(
        tmp_path / f"rows{suffix}", MultiLabelClassification(), label=["b", "a"]
    )
    assert task.names == ("b", "a")
    assert {
        text: label
        for split in splits.values()
        for text, label in zip(split["text"], split["b+a"], strict=True)
    } == {
        text: ["b"] * b + ["a"] * a
        for text, a, b in zip(MARKS["text"], MARKS["a"], MARKS["b"], strict=True)
    }


def test_examples_of_columns_are_encoded_and_empty_cells_leave_them_unlabelled(tmp_path, tokenizer):
    cells = [1, 0, None, -1] * 10
    write(Dataset.from_dict(MARKS | {"a": cells}), tmp_path / "rows.jsonl")
    data = Data(source=str(tmp_path / "rows.jsonl"), validation=None, test=None, label=["a", "b"])
    raw, task = pipeline.load(data, MultiLabelClassification(), 0)
    labels = pipeline.encode(raw, task, tokenizer, data)["train"].with_format("torch")["labels"][:]
    assert labels.isnan().any(1).sum() == 20  # the others are held out
    assert set(labels.nan_to_num().flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("cell", "keys", "message"),
    [
        (2, {}, "column 'b' .* is 2 in row 3, but"),
        ("x", {}, "column 'b' .* is 'x' in row 3, but"),
        (0, {"label": ["a", "c"]}, "data.label is c, but .* text, a, b"),
        (0, {"labels": ["one"]}, "data.labels is one, but data.label has 2 columns"),
    ],
)
def test_columns_that_are_no_labels_are_refused(cell, keys, message, tmp_path):
    column = [*MARKS["b"]] if cell != "x" else [str(each) for each in MARKS["b"]]
    column[3] = cell
    write(Dataset.from_dict(MARKS | {"b": column}), tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "rows.jsonl", MultiLabelClassification(), **({"label": ["a", "b"]} | keys))


@pytest.mark.parametrize("column", ["b", "label"])
def test_an_empty_column_is_called_empty(column, tmp_path):
    rows = "".join(f"text {row},{f',{row % 2}' if column == 'b' else 'x,'}\n" for row in range(30))
    (tmp_path / "rows.csv").write_text("text,b,label\n" + rows)
    with pytest.raises(UserError, match=rf"column '{column}' of .* is empty"):
        load(tmp_path / "rows.csv", text=["text", "b"])
    if column == "b":
        with pytest.raises(UserError, match="column 'b' of .* is empty"):
            load(tmp_path / "rows.csv", CausalLanguageModelling(), text=["text", "b"])
    else:
        with pytest.raises(UserError, match="no training example of .* has a label"):
            load(tmp_path / "rows.csv", labels=["p", "q"])


def test_labels_that_yaml_reads_as_booleans_are_refused_with_a_hint():
    with pytest.raises(
        UserError,
        match=r"is 'up' in row 0, but .* False, True: .* data.labels, .* in quotes$",
    ):
        load(f"{HERE}.made", labels=["False", "True"])


# ---- splits and labels


def test_held_out_splits_do_not_depend_on_the_seed_and_do_not_overlap():
    first, second = (load(f"{HERE}.made", seed=seed, labelled=4) for seed in (0, 1))
    for name in ("validation", "test"):
        assert first[name].to_dict() == second[name].to_dict()
        assert len(first[name]) == 2
        assert None not in first[name]["label"][:]
    texts = [text for split in first.values() for text in split["text"]]
    assert sorted(texts) == sorted(ROWS["text"])
    assert (
        load(f"{HERE}.made", validation="validation")["test"].to_dict() == first["test"].to_dict()
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"validation": "train"},
            "data.validation is train, but data.train is that split too",
        ),
        ({"test": "train"}, "data.test is train, but data.train is that split too"),
        (
            {"validation": "validation", "test": "validation"},
            "data.test is validation, but data.validation is that split too",
        ),
        ({"unlabelled": "train"}, "data.unlabelled is train, but data.train is that split too"),
        (
            {"test": "validation", "unlabelled": "validation"},
            "data.unlabelled is validation, but data.test is that split too",
        ),
    ],
)
def test_a_split_has_one_use(keys, message):
    with pytest.raises(UserError, match=message):
        load(f"{HERE}.made", **keys)


def test_texts_in_the_training_split_and_in_another_are_logged(tmp_path, caplog):
    splits = {
        "train": ROWS,
        "validation": MORE,
        "test": {name: values[:3] for name, values in ROWS.items()},
    }
    splits["test"] = splits["test"] | {
        "text": ["text number 0", " text\nnumber  1", "Text number 2"]
    }
    DatasetDict({name: Dataset.from_dict(rows) for name, rows in splits.items()}).save_to_disk(
        tmp_path
    )
    loaded = load(tmp_path, validation="validation", test="test")
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 texts of the test split are texts of the training split too"
    ]
    assert [len(split) for split in loaded.values()] == [20, 8, 3]
    caplog.clear()
    (tmp_path / "more.txt").write_text("other text 0\nother text 9")
    load(f"{HERE}.made", validation="validation", unlabelled=str(tmp_path / "more.txt"))
    assert "1 of 8 texts of the validation split are texts of the training split too" in caplog.text


def test_pairs_are_compared_as_pairs(tmp_path, caplog):
    for name, rows in {
        "train": {"a": ["x", "y"], "b": ["y", None]},
        "test": {"a": ["x", "y"], "b": [None, ""]},
    }.items():
        write(Dataset.from_dict(rows | {"label": ["up", "down"]}), tmp_path / f"{name}.jsonl")
    write(
        Dataset.from_dict({"a": ["v", "u"], "b": ["w", "w"], "label": ["up", "down"]}),
        tmp_path / "validation.jsonl",
    )
    load(tmp_path, text=["a", "b"], validation="validation", test="test")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        f"column 'b' of split test of {tmp_path} is empty in all 2 rows",
        "1 of 2 texts of the test split are texts of the training split too",
    ]


@pytest.mark.parametrize("task", [SingleLabelClassification, MultiLabelClassification])
def test_held_out_splits_hold_every_class_in_its_share(task, tmp_path):
    names = ["common"] * 200 + ["rare"] * 20 + ["single"]
    cells = names if task is SingleLabelClassification else [[name] for name in names]
    rows = {"text": [f"text {row}" for row in range(221)], "label": cells}
    write(Dataset.from_dict(rows), tmp_path / "rows.jsonl")
    splits = load(tmp_path / "rows.jsonl", task())
    counts = {
        role: Counter(cell if isinstance(cell, str) else cell[0] for cell in split["label"])
        for role, split in splits.items()
    }
    assert counts == {
        "validation": {"common": 20, "rare": 2},
        "test": {"common": 20, "rare": 2},
        "train": {"common": 160, "rare": 16, "single": 1},
    }


def test_what_a_split_lacks_is_counted_after_the_draw(tmp_path, caplog):
    rows = {"text": [f"text {row}" for row in range(42)], "label": [*"ab" * 20, "c", "d"]}
    write(Dataset.from_dict(rows), tmp_path / "rows.jsonl")
    load(tmp_path / "rows.jsonl", labels=[*"abcde"])
    assert [record.getMessage() for record in caplog.records] == [
        f"no training example of {tmp_path}/rows.jsonl is labelled e: the model cannot learn it",
        "no example of the validation split has 2 of 5 labels, c, d: it has no metrics of them",
        "no example of the test split has 2 of 5 labels, c, d: it has no metrics of them",
    ]


def test_splits_without_classes_are_drawn_at_random_as_before(tmp_path):
    rows = {"text": [f"text {row}" for row in range(30)], "label": [float(r) for r in range(30)]}
    write(Dataset.from_dict(rows), tmp_path / "rows.jsonl")
    order = np.random.default_rng(0).permutation(30)
    for task in (Regression(), CausalLanguageModelling()):
        splits = load(tmp_path / "rows.jsonl", task)
        assert splits["validation"]["text"][:] == [f"text {row}" for row in sorted(order[:3])]
        assert splits["test"]["text"][:] == [f"text {row}" for row in sorted(order[-3:])]


@pytest.mark.parametrize(
    ("recorded", "keys", "warned"),
    [
        ({}, {}, True),
        ({"holdout": pipeline.HOLDOUT_VERSION}, {}, False),
        ({}, {"validation": "validation", "test": "test"}, False),
        ({}, {"label": None}, False),
    ],
)
def test_a_run_of_an_earlier_draw_is_measured_with_a_warning(
    recorded, keys, warned, tmp_path, caplog
):
    (tmp_path / "progress.json").write_text(json.dumps({"found": recorded}))
    data = Data(**({"source": "none", "validation": None} | keys))
    task = SingleLabelClassification()
    task.names = ("a", "b")
    evaluate_command._warn_of_other_holdout(tmp_path, data, task)
    assert ("held out other examples" in caplog.text) == warned


def test_examples_of_classes_without_a_second_one_are_not_held_out(tmp_path):
    rows = {"text": [f"text {row}" for row in range(30)], "label": [f"c{r}" for r in range(30)]}
    write(Dataset.from_dict(rows), tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"data.validation is null, but 30 labelled"):
        load(tmp_path / "rows.jsonl")


def test_too_few_examples_to_hold_out_are_refused(tmp_path):
    write(Dataset.from_dict({"text": ["a", "b"], "label": ["a", "b"]}), tmp_path / "few.csv")
    with pytest.raises(
        UserError, match=r"data.validation is null, but 2 labelled training examples are too few"
    ):
        load(tmp_path / "few.csv")


def test_labels_are_removed_class_by_class():
    one, same, other = (
        load(f"{HERE}.made", seed=seed, validation="validation", labelled=6)["train"]
        for seed in (3, 3, 4)
    )
    assert Counter(one["label"]) == {"up": 3, "down": 3, None: 12}
    assert one.to_dict() == same.to_dict()
    assert one["label"][:] != other["label"][:]
    assert one["text"][:] == other["text"][:]
    expected = dict(zip(ROWS["text"], ROWS["label"], strict=True))
    assert all(
        label in (None, expected[text])
        for text, label in zip(one["text"], one["label"], strict=True)
    )


@pytest.mark.parametrize("total", [3, 4, 10, 57, 101])
def test_quotas_are_in_proportion_and_leave_no_class_out(total):
    counts = {"many": 90, "some": 10, "one": 1}
    shares = largest_remainder(counts, total)
    assert sum(shares.values()) == total
    assert all(1 <= shares[name] <= counts[name] for name in counts)
    assert all(abs(shares[name] - total * counts[name] / 101) <= 2 for name in counts)


@pytest.mark.parametrize(
    ("labelled", "task", "message"),
    [
        (
            1,
            None,
            "data.labelled is 1, but each of the 2 classes needs a labelled example",
        ),
        (99, None, "data.labelled is 99, but only 16 training examples have a label"),
        (
            5,
            CausalLanguageModelling(),
            "data.labelled is 5, but the examples of .* are used without labels",
        ),
    ],
)
def test_a_number_of_labels_that_the_data_lack_is_refused(labelled, task, message):
    with pytest.raises(UserError, match=message):
        load(f"{HERE}.made", task, labelled=labelled)


def test_unlabelled_texts_join_the_training_split(tmp_path):
    (tmp_path / "more.txt").write_text("from a file\n\nand again")
    split = load(f"{HERE}.made", unlabelled="texts")["train"]
    file = load(f"{HERE}.made", unlabelled=str(tmp_path / "more.txt"))["train"]
    assert split["text"][-2:] == ["only", "texts"]
    assert file["text"][-2:] == ["from a file", "and again"]
    assert split["label"][-2:] == file["label"][-2:] == [None, None]
    assert len(split) == len(file) == 18
    assert load(f"{HERE}.made", CausalLanguageModelling(), unlabelled="texts")[
        "train"
    ].column_names == ["text"]


def test_data_without_labels_take_the_names_of_the_recipe():
    splits, task = load_bound(f"{HERE}.made", label=None, labels=["up", "down"])
    assert splits["train"].column_names == ["text"]
    assert task.names == ("up", "down")


# ---- encoding


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ROWS["text"], 300)


@pytest.fixture(scope="module")
def without_special_tokens():
    """A tokenizer without a begin or end token: the first token of a text is context only."""
    tokenizer = train_tokenizer(ROWS["text"], 300, LANGUAGE_TOKENS)
    tokenizer.eos_token = None
    return tokenizer


@pytest.fixture
def encoded_sizes(monkeypatch):
    """The sizes of the batches that are tokenized."""
    calls = []
    original = SingleLabelClassification.encode

    def encode(self, examples, tokenizer, data):
        calls.append(len(examples["text"]))
        return original(self, examples, tokenizer, data)

    monkeypatch.setattr(SingleLabelClassification, "encode", encode)
    return calls


def encoded(tokenizer, task=None, seed=0, **keys) -> DatasetDict:
    task = task or SingleLabelClassification()
    keys = {"validation": "validation", "test": None} | keys
    data = Data(source=f"{HERE}.made", **keys)
    raw, task = pipeline.load(data, task, seed)
    return pipeline.encode(raw, task, tokenizer, data)


def entries(file="*") -> list:
    return [*(store.cache_root() / "examples").glob(f"*/{file}")]


def test_texts_are_tokenized_once_and_stored(tokenizer, encoded_sizes):
    first = encoded(tokenizer)
    assert sum(encoded_sizes) >= 28
    encoded_sizes.clear()
    tokenizer(
        "the last use", truncation=True, max_length=3, padding="max_length"
    )  # leaves its mark on the tokenizer's state
    again = encoded(tokenizer)
    assert encoded_sizes == []
    assert {name: split.to_dict() for name, split in first.items()} == {
        name: split.to_dict() for name, split in again.items()
    }
    assert len(entries(encoding.FILE)) == 3
    assert all(
        file["filename"] in map(str, entries())
        for split in again.values()
        for file in split.cache_files
    )  # mapped, not read
    assert again["train"].cache_files


@pytest.mark.parametrize("change", ["max_length", "tokenizer", "labels", "texts", "version"])
def test_a_changed_input_is_a_new_file(change, tokenizer, encoded_sizes, monkeypatch):
    encoded(tokenizer)
    encoded_sizes.clear()
    if change == "version":
        monkeypatch.setattr(encoding, "VERSION", -1)
    changed = {
        "max_length": lambda: encoded(tokenizer, SingleLabelClassification(max_length=64)),
        "tokenizer": lambda: encoded(train_tokenizer(ROWS["text"], 280)),
        "labels": lambda: encoded(tokenizer, labels=["up", "down"]),
        "texts": lambda: encoded(tokenizer, labelled=4),
        "version": lambda: encoded(tokenizer),
    }
    changed[change]()
    assert encoded_sizes


def test_an_interrupted_run_is_repeated(tokenizer, tmp_path, monkeypatch):
    expected = encoded(tokenizer)["train"].to_dict()
    texts = load(f"{HERE}.made", validation="validation")["train"]["text"][:]
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "CHUNK", 5)
    encode = SingleLabelClassification.encode

    def interrupted(self, examples, tokenizer, data):
        if examples["text"][0] == texts[10]:
            raise KeyboardInterrupt
        return encode(self, examples, tokenizer, data)

    with monkeypatch.context() as context:
        context.setattr(SingleLabelClassification, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoded(tokenizer)
    assert not entries()
    assert encoded(tokenizer)["train"].to_dict() == expected


@pytest.mark.parametrize("damage", ["shortened", "overwritten"])
def test_a_damaged_file_is_made_again(damage, tokenizer, encoded_sizes, caplog):
    expected = encoded(tokenizer)["train"].to_dict()
    for file in entries(encoding.FILE):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(
            content[:100]
            if damage == "shortened"
            else content[: middle - 200] + bytes(400) + content[middle + 200 :]
        )
    encoded_sizes.clear()
    assert encoded(tokenizer)["train"].to_dict() == expected
    assert encoded_sizes
    assert "is damaged (examples.arrow): it is computed again" in caplog.text


def test_truncated_texts_are_counted(tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="distill"):
        encoded(tokenizer, SingleLabelClassification(max_length=4))
    assert (
        "18 of 18 texts of the train split are longer than task.max_length, 4 tokens: truncated"
        in caplog.text
    )


def test_texts_without_anything_to_predict_are_refused(without_special_tokens):
    raw = DatasetDict(train=Dataset.from_dict({"text": ["a", "b"]}))
    with pytest.raises(
        UserError, match=r"the train split has 2 texts, but none of them has a token to predict"
    ):
        pipeline.encode(raw, CausalLanguageModelling(), without_special_tokens, Data(source="none"))


def test_a_first_batch_without_windows_does_not_hide_later_ones(
    without_special_tokens, monkeypatch
):
    monkeypatch.setattr(encoding, "CHUNK", 2)
    raw = DatasetDict(train=Dataset.from_dict({"text": ["a", "b", "c", "d", "long enough"]}))
    split = pipeline.encode(
        raw, CausalLanguageModelling(), without_special_tokens, Data(source="none")
    )["train"]
    assert len(split) == 1


def test_a_fingerprint_is_of_the_content(tmp_path):
    split = Dataset.from_dict(ROWS)
    split.save_to_disk(tmp_path / "saved")
    halves = datasets.concatenate_datasets([split.select(range(7)), split.select(range(7, 20))])
    alike = [
        split,
        datasets.load_from_disk(str(tmp_path / "saved")),
        halves,
        split.select([*range(20)]),
        split.select_columns(["label", "text"]),
    ]
    assert len({pipeline.fingerprint(each) for each in alike}) == 1
    unlike = [
        split.select(range(19)),
        split.rename_column("text", "body"),
        split.select([1, 0, *range(2, 20)]),
        split.class_encode_column("label"),
    ]
    assert len({pipeline.fingerprint(each) for each in [split, *unlike]}) == 5


@pytest.mark.parametrize("task", [SingleLabelClassification, MultiLabelClassification, Regression])
def test_only_labelled_leaves_out_examples_without_a_label(task, tokenizer):
    cells = {
        SingleLabelClassification: ["a", None, "b"],
        MultiLabelClassification: [["a"], None, []],
        Regression: [-100.0, None, 2.0],
    }[task]
    it, raw = task(), Dataset.from_dict({"text": ["x", "y", "z"], "label": cells})
    it.names = ("a", "b")
    split = pipeline.encode(DatasetDict(train=raw), it, tokenizer, Data(source="none"))["train"]
    assert pipeline.only_labelled(split, it)["input_ids"][:] == [
        split["input_ids"][0],
        split["input_ids"][2],
    ]


@pytest.mark.parametrize("task", [SingleLabelClassification, MultiLabelClassification, Regression])
def test_nothing_labelled_is_refused(task, tokenizer):
    it, raw = task(), Dataset.from_dict({"text": ["x", "y"], "label": [None, None]})
    it.names = ("a", "b")
    split = pipeline.encode(DatasetDict(train=raw), it, tokenizer, Data(source="none"))["train"]
    with pytest.raises(
        UserError,
        match=r"0 of 2 training examples have a label, but .* data.label",
    ):
        pipeline.only_labelled(split, it)


def test_the_default_recipe_data_load():
    try:
        corpora.bbc_news()
    except UserError:
        pytest.skip("the extra `demo` is not installed")
    splits, task = load_bound(
        "distill.corpora.bbc_news", validation="validation", test="test", labelled=100
    )
    assert len(task.names) == 5
    assert sum(label is not None for label in splits["train"]["label"]) == 100
