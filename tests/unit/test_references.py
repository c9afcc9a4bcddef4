"""References in recipes: what they may name, and that their values are stored nowhere."""

import logging

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from distill.errors import UserError
from distill.recipe import compose, explain, references
from distill.recipe.config import Run

SECRET = "s3cr3t/value"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A recipe with references to an environment variable."""
    monkeypatch.setenv("MY_SECRET", SECRET)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "task: {_target_: distill.tasks.SingleLabelClassification}\n"
        "data: {source: '${oc.env:MY_SECRET}/data.csv'}\n"
        "student: {model: nowhere}\n"
        "loss: {alpha: 1.0}\n"
        "tracking: {project: '${data.source}'}\n"
    )
    return compose.load_recipe(str(file))


def test_references_are_resolved_for_the_run(run):
    assert run.data.source == f"{SECRET}/data.csv" == run.tracking.project


def test_a_saved_recipe_holds_the_reference_and_means_the_same(run, tmp_path):
    saved = tmp_path / "saved.yaml"
    compose.save_recipe(run, saved)
    assert SECRET not in saved.read_text()
    assert "${oc.env:MY_SECRET}/data.csv" in saved.read_text()
    assert compose.load_recipe(str(saved)) == run


def test_a_recipe_follows_the_environment(run, tmp_path, monkeypatch):
    compose.save_recipe(run, tmp_path / "saved.yaml")
    monkeypatch.setenv("MY_SECRET", "elsewhere")
    assert compose.load_recipe(str(tmp_path / "saved.yaml")).data.source == "elsewhere/data.csv"


def test_logs_hold_the_reference(run):
    for message, arguments in ((f"reading {SECRET}", ()), ("reading %s", (SECRET,))):
        record = logging.LogRecord("distill", 20, "", 0, message, arguments, None)
        assert references.HideValues().filter(record)
        assert record.getMessage() == "reading ${oc.env:MY_SECRET}"


def test_texts_in_dictionaries_and_lists_hold_the_reference(run):
    hidden = references.hide_in_values({"a": [SECRET, 1], "b": {"c": f"{SECRET}/x"}})
    assert hidden == {"a": ["${oc.env:MY_SECRET}", 1], "b": {"c": "${oc.env:MY_SECRET}/x"}}


@pytest.mark.parametrize(
    "text", ["${oc.decode:x}", "${now:%Y}", "${oc.create:{}}", "a${ oc.select : x}", "${hydra:job}"]
)
def test_other_resolvers_are_refused_before_they_run(text, run):
    with pytest.raises(UserError, match=r"data\.source is "):
        references.check_references({"data": {"source": text}})


@pytest.mark.parametrize(
    "text",
    [
        "${${name}:MY_SECRET}",
        "${oc.${name}:x}",
        "${oc.env:${name}}",
        "${oc.env:MY_${name}}",
        "${oc.env:'MY_SECRET'}",
        "${" * 20 + "name" + "}" * 20,
    ],
)
def test_variables_whose_names_are_not_written_are_refused(text):
    with pytest.raises(UserError, match=r"data\.source is "):
        references.check_references({"data": {"source": text}})


@pytest.mark.parametrize(
    "text", ["${data.${name}}", "${ oc.env : HOME , x }/y", "${oc.env:HOME,${name}}", "${.label}"]
)
def test_keys_and_variables_may_be_nested(text):
    references.check_references({"data": {"source": text}})


def test_a_variable_that_is_not_set_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_SECRET", raising=False)
    recipe = OmegaConf.merge(
        OmegaConf.structured(Run),
        {
            "name": "x",
            "task": {"_target_": "distill.tasks.SingleLabelClassification"},
            "data": {"source": "${oc.env:MY_SECRET}"},
            "student": {"model": "x"},
        },
    )
    with pytest.raises(InterpolationResolutionError) as error:
        compose.validate(recipe)
    sentence = explain.explain_error(error.value)
    assert "MY_SECRET" in sentence
    assert "\n" not in sentence
