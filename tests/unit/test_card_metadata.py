"""The metadata of a model card, read back as the Hub reads them."""

import pytest
from huggingface_hub import ModelCard

from distill.export import card_metadata
from distill.export.card_metadata import Origins, is_hub_name, metadata, origins
from distill.recipe import config
from distill.tasks import SingleLabelClassification

TASK = SingleLabelClassification()
TASK.names = ("no", "yes")
HUB_CARDS = {
    "org/teacher": {"license": "apache-2.0", "language": ["en", "pl"]},
    "org/student": {"license": "other", "license_name": "odd", "license_link": "LICENSE"},
}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The cards of two models on the Hub, in place of the network."""
    load = ModelCard.load

    def fetch(name, **options):
        if name in HUB_CARDS:
            return ModelCard(f"---\n{_yaml(HUB_CARDS[name])}\n---\n")
        if name.endswith("README.md"):
            return load(name, **options)
        raise OSError(f"{name} is not on the Hub")

    monkeypatch.setattr(card_metadata.ModelCard, "load", fetch)


def _yaml(values):
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def run_of(student=None, teacher="org/teacher", source="org/data", **data):
    return config.Run(
        name="small",
        task={},
        data=config.Data(source=source, **data),
        teacher=None if teacher is None else config.Teacher(model=teacher),
        student=config.Student(model=student, layers=None if student else [0]),
        export=config.Export(format="dense"),
    )


def read(run, quality=None):
    made_from = origins(run.student, run.teacher)
    text = metadata(run.name, run.data, TASK, run.export.format, quality or {}, made_from)
    return ModelCard(f"{text}\n\n# small\n").data


def test_a_model_on_the_hub_is_the_base_with_its_license_and_language():
    data = read(run_of())
    assert data.base_model == ["org/teacher"]
    assert (data.license, data.language) == ("apache-2.0", ["en", "pl"])
    assert data.datasets == ["org/data"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.tags == ["distillation"]


def test_the_license_of_the_students_own_weights_comes_first():
    data = read(run_of("org/student"))
    assert data.base_model == ["org/student", "org/teacher"]
    assert (data.license, data.license_name, data.license_link) == ("other", "odd", "LICENSE")


@pytest.mark.parametrize("base", ["org/base", ["org/base", "org/other"]])
def test_a_folder_passes_on_what_its_own_card_says(tmp_path, base):
    card = f"---\nlicense: mit\nbase_model: {base}\n---\n# mine\n"
    (tmp_path / "README.md").write_text(card)
    data = read(run_of(teacher=str(tmp_path)))
    assert data.base_model == ([base] if isinstance(base, str) else base)
    assert data.license == "mit"


@pytest.mark.parametrize(
    "card", [None, "# no metadata", "---\nlicense: [\n---\n", "---\n- 3\n---\n"]
)
def test_a_folder_without_a_readable_card_says_nothing(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    data = read(run_of(teacher=str(tmp_path), source=str(tmp_path / "data.csv")))
    assert (data.base_model, data.license, data.datasets) == (None, None, None)
    assert str(tmp_path) not in data.to_yaml()


def test_a_model_that_cannot_be_fetched_is_still_the_base():
    data = read(run_of(teacher="org/private"))
    assert (data.base_model, data.license) == (["org/private"], None)


def test_results_are_a_model_index():
    quality = {"accuracy": 0.75, "macro_f1": 0.5, "mcc": float("nan"), "ece": 0.125, "empty": None}
    data = read(run_of(config="sst2", test="validation", validation=None), quality)
    results = {each.metric_type: each for each in data.eval_results}
    assert results.keys() == {"accuracy", "f1", "ece"}
    accuracy = results["accuracy"]
    assert accuracy.metric_value == 0.75
    assert (accuracy.dataset_type, accuracy.dataset_config) == ("org/data", "sst2")
    assert (accuracy.dataset_split, accuracy.task_type) == ("validation", "text-classification")


def test_what_was_not_measured_has_no_model_index():
    assert "model-index" not in metadata(
        "small", run_of().data, TASK, "dense", {}, Origins([], True)
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-base-uncased", True),
        ("org/model_1.5-b", True),
        ("/tmp/model", False),
        ("./model", False),
        ("~/model", False),
        ("a/b/c", False),
        ("package:demo/model", False),
        ("tests", False),
    ],
)
def test_names_of_the_hub(name, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert is_hub_name(name) is expected


def test_a_source_that_is_a_function_is_no_data_set():
    assert read(run_of(source="distill.corpora.generated")).datasets is None
