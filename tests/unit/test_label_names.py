"""Names of labels are never lost where a model or the data has better ones than numbers."""

import pytest
import torch
from datasets import DatasetDict

from distill import corpora, models
from distill.prepare import prepare, prepare_run
from distill.tasks import SingleLabelClassification
from distill.tasks.labels import Labels
from tests.worlds import TINY, tiny

NAMES = ("alpha", "beta", "gamma", "delta")


def numbers():
    """The generated corpus with integers for labels, whose column declares no names."""
    made = corpora.generated()
    places = {name: place for place, name in enumerate(sorted({*made["train"]["label"]}))}
    return DatasetDict(
        {
            name: split.remove_columns("label").add_column(
                "label", [places[label] for label in split["label"]]
            )
            for name, split in made.items()
        }
    )


@pytest.fixture(scope="module")
def teacher(_module_store, tmp_path_factory):
    """The folder of a classifier whose labels have names, and the number of its labels."""
    path = tmp_path_factory.mktemp("teacher")
    made = prepare_run(tiny(data={"source": "tests.unit.test_label_names.numbers"}))
    count = len(made.task.names)
    task = made.task.with_labels(Labels(NAMES[:count]))
    torch.manual_seed(0)
    model = models.load(None, TINY["teacher"]["config"], task, "teacher", made.tokenizer)
    models.save(model, made.tokenizer, path)
    return str(path), NAMES[:count]


def recipe(path, **changes):
    return tiny(
        tokenizer={"vocab_size": None},
        teacher={"model": path, "config": None} | changes.pop("teacher", {}),
        data={"source": "tests.unit.test_label_names.numbers"} | changes.pop("data", {}),
    )


def test_numbers_get_the_names_of_a_frozen_teacher(teacher):
    path, names = teacher
    made = prepare_run(recipe(path))
    assert made.task.names == names
    plain = prepare_run(tiny(data={"source": "tests.unit.test_label_names.numbers"}))
    for split in ("train", "validation", "test"):
        assert made.examples[split]["labels"][:] == plain.examples[split]["labels"][:]
        assert {*made.raw[split]["label"]} == {*names}


def test_a_finished_run_is_measured_with_them(teacher):
    path, names = teacher
    run = recipe(path)
    tokenizers = models.Tokenizers(models.load_tokenizer(path))
    made = prepare(SingleLabelClassification(24), run.data, run.seed, tokenizers, ["test"], path)
    assert made.task.names == names


@pytest.mark.parametrize(
    "changes",
    [{"teacher": {"finetune": {"epochs": 1}}}, {"data": {"labels": ["w", "x", "y", "z"]}}],
    ids=["fine-tuned", "listed"],
)
def test_names_are_not_taken_from_a_head_that_is_trained_again_nor_over_listed_ones(
    teacher, changes
):
    path, names = teacher
    if "data" in changes:
        changes = {"data": {"labels": changes["data"]["labels"][: len(names)]}}
    made = prepare_run(recipe(path, **changes))
    expected = tuple(changes.get("data", {}).get("labels", map(str, range(len(names)))))
    assert made.task.names == expected


def test_a_model_keeps_its_names_where_the_data_have_numbers(teacher):
    path, names = teacher
    made = prepare_run(tiny(data={"source": "tests.unit.test_label_names.numbers"}))
    loaded = models.load_trained(path, made.task, "teacher", made.tokenizer)
    assert tuple(loaded.config.id2label.values()) == names
