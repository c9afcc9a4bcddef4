"""Columns of other kinds than a recipe needs, and names that could be taken for others."""

import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import data
from distill.errors import UserError
from distill.recipe.config import Data
from distill.tasks import MultiLabelClassification, Regression, SingleLabelClassification

TEXTS = [f"a text of number {row}" for row in range(40)]
SPLIT = {"validation": None, "test": None}


def load(file, task, **keys):
    return data.load(Data(source=str(file), **(SPLIT | keys)), task, 0)


def jsonl(folder, rows):
    file = folder / "d.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def refusal(act):
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


OBJECTS = {
    "an object": {"name": "x"},
    "a list of objects": [{"name": "x"}],
    "a list of lists": [["x"], ["y"]],
    "an object in an object": {"a": {"b": 1}},
}


@pytest.mark.parametrize("labels", [None, ["x", "y"]], ids=["read", "listed"])
@pytest.mark.parametrize("cell", OBJECTS.values(), ids=OBJECTS.keys())
@pytest.mark.parametrize("task", [SingleLabelClassification, MultiLabelClassification, Regression])
def test_labels_that_are_no_labels_are_named_with_their_column(task, cell, labels, tmp_path):
    file = jsonl(tmp_path, [{"text": text, "label": cell} for text in TEXTS])
    keys = {} if task is Regression else {"labels": labels}
    assert "column 'label'" in refusal(lambda: load(file, task(), **keys))


@pytest.mark.parametrize("cell", [[1], {"x": 1}], ids=str)
def test_objects_in_several_label_columns_are_named(cell, tmp_path):
    rows = [{"text": text, "a": 1, "b": cell} for text in TEXTS]
    act = lambda: load(jsonl(tmp_path, rows), MultiLabelClassification(), label=["a", "b"])  # noqa: E731
    assert "column 'b'" in refusal(act)


def test_a_list_among_names_is_named(tmp_path):
    rows = [{"text": text, "label": "xy"[row % 2]} for row, text in enumerate(TEXTS)]
    split = Dataset.from_list([{**row, "label": [row["label"]]} for row in rows])
    DatasetDict(train=split).save_to_disk(tmp_path / "saved")
    sentence = refusal(lambda: load(tmp_path / "saved", SingleLabelClassification()))
    assert "MultiLabelClassification" in sentence


COLUMNS = ("text", "labels", "input_ids", "attention_mask", "length", "rows", "size", "truncated")


@settings(max_examples=10, deadline=None)
@given(names=st.permutations([*COLUMNS, "label", "first_window"]))
def test_the_names_of_columns_change_no_example(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    text, label = names[:2]
    rows = [{text: each, label: "xy"[row % 2]} for row, each in enumerate(TEXTS)]
    splits, task = load(jsonl(folder, rows), SingleLabelClassification(), text=[text], label=label)
    assert task.names == ("x", "y")
    expected = {each: "xy"[row % 2] for row, each in enumerate(TEXTS)}
    for split in splits.values():
        assert dict(zip(split[text], split[label], strict=True)).items() <= expected.items()
    assert sum(map(len, splits.values())) == len(TEXTS)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "d.csv"
    file.write_text("text,label,text\n" + "".join(f"{text},x,b\n" for text in TEXTS))
    assert "'text' more than once" in refusal(lambda: load(file, SingleLabelClassification()))


def test_a_column_with_the_name_of_joined_columns_is_refused(tmp_path):
    rows = [{"text": text, "a": 1, "b": row % 2, "a+b": "x"} for row, text in enumerate(TEXTS)]
    act = lambda: load(jsonl(tmp_path, rows), MultiLabelClassification(), label=["a", "b"])  # noqa: E731
    assert "a+b" in refusal(act)


@pytest.mark.parametrize("name", ["nope.csv", "./nope", "a/b/c", "nope"])
def test_another_source_of_texts_is_named_by_its_key(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text, "label": "xy"[row % 2]} for row, text in enumerate(TEXTS)]
    act = lambda: load(jsonl(tmp_path, rows), SingleLabelClassification(), unlabelled=name)  # noqa: E731
    assert refusal(act).startswith(f"data.unlabelled is {name}, but")


FOLDERS = {
    "pictures": ({"a.png": b"\x89PNG", "cats/b.jpg": b"x"}, ".jpg, .png"),
    "hidden files": ({".keep": b""}, "none of a known kind"),
    "a script": ({"mine.py": b"raise SystemExit", "data/train.csv": b"text\na\n"}, "mine.py"),
}


@pytest.mark.parametrize(("files", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_without_texts_is_named_with_what_it_holds(files, words, tmp_path):
    folder = tmp_path / "mine"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sentence = refusal(lambda: load(folder, SingleLabelClassification()))
    assert sentence.startswith(f"data.source is {folder}, but") and words in sentence


def test_a_program_beside_tables_is_no_data_set(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("raise SystemExit")
    rows = [{"text": text, "label": "xy"[row % 2]} for row, text in enumerate(TEXTS)]
    jsonl(folder, rows).rename(folder / "train.jsonl")
    splits, _ = load(folder, SingleLabelClassification())
    assert sum(map(len, splits.values())) == len(TEXTS)


@pytest.mark.parametrize("value", ["32", 32.5, None, True, [32], {"a": 1}, 0, -3])
def test_a_length_that_is_no_length_is_shown_as_it_is(value):
    assert f"task.max_length is {value!r}, but" in refusal(
        lambda: SingleLabelClassification(max_length=value)
    )
