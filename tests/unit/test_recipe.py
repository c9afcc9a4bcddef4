import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError
from distill.recipe import compose, config, explain, help, hydra_config
from distill.recipe.config import Run

TINY = yaml.safe_load((compose.SHIPPED / "tiny.yaml").read_text())


def checked(**changes):
    return compose.validate(
        OmegaConf.merge(OmegaConf.structured(Run), {"name": "x"}, TINY, changes)
    )


HIDDEN = {"_target_": "distill.terms.HiddenStates"}
FSDP = {"strategy": "fsdp"}


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"loss": {"alpha": 1.5}}, "loss.alpha", "1.5"),
        ({"loss": {"temperature": 0}}, "loss.temperature", "0"),
        ({"loss": {"chunk": -1}}, "loss.chunk", "-1"),
        ({"loss": {"beta": 1.0}}, "loss.beta", "1"),
        ({"loss": {"terms": {"h": {"weight": 1.0}}}}, "loss.terms.h._target_", "None"),
        ({"teacher": {"outputs": "catched"}}, "teacher.outputs", "catched"),
        (
            {"teacher": {"outputs": "sampled"}, "loss": {"divergence": "reverse_kl"}},
            "loss.divergence",
            "reverse_kl, but teacher.outputs=sampled",
        ),
        (
            {"teacher": {"outputs": "top_k"}, "loss": {"divergence": "logit_mse"}},
            "loss.divergence",
            "logit_mse, but teacher.outputs=top_k",
        ),
        ({"teacher": {"tokens": 65}}, "teacher.tokens", "65"),
        ({"teacher": {"dtype": "fp8"}}, "teacher.dtype", "fp8"),
        ({"teacher": None}, "student.layers", "[0, 2]"),
        ({"data": {"text": ["a", "b", "c"]}}, "data.text", "['a', 'b', 'c']"),
        ({"data": {"text": ["a", "a"]}}, "data.text", "['a', 'a']"),
        ({"data": {"text": ["label"]}}, "data.text", "['label'] and data.label is label"),
        ({"data": {"batch_size": 0}}, "data.batch_size", "0"),
        ({"seed": -1}, "seed", "-1"),
        ({"trainer": {"epochs": float("inf")}}, "trainer.epochs", "inf"),
        ({"trainer": {"precision": "fp8"}}, "trainer.precision", "fp8"),
        ({"trainer": FSDP | {"compile": True}}, "trainer.compile", "true"),
        ({"trainer": FSDP | {"precision": "16-mixed"}}, "trainer.precision", "16-mixed"),
        (
            {"trainer": {"accumulate": 3}, "data": {"batch_size": 2}},
            "trainer.accumulate",
            "3, but data.batch_size is 2",
        ),
        ({"tokenizer": {"model": "x"}}, "tokenizer.model", "x"),
        ({"callbacks": {"c": {"_target_": "nodots"}}}, "callbacks.c._target_", "nodots"),
        ({"callbacks": {"c": HIDDEN}}, "callbacks.c.weight", "not given"),
    ],
)
def test_a_refused_value_is_named_with_its_key(changes, key, value):
    with pytest.raises(UserError) as refused:
        checked(**changes)
    sentence = str(refused.value)
    assert sentence.startswith(f"{key} is {value}") and ", but " in sentence and ": " in sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"divergence": "forward_lk"}}, ["forward_lk", "did you mean forward_kl"]),
        ({"loss": {"divergence": "nowhere.at_all"}}, ["nowhere"]),
        ({"loss": {"terms": {"loss": HIDDEN}}}, ["loss.terms", "'loss'"]),
        ({"task": {"max_lenght": 8}}, ["task.max_lenght", "did you mean max_length"]),
        ({"teacher": {"model": "x"}}, ["teacher", "both of model and config"]),
        ({"student": {"layers": None, "architecture": None}}, ["student", "none of model, config"]),
    ],
)
def test_a_refused_key_is_named(changes, words):
    with pytest.raises(UserError) as refused:
        checked(**changes)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_hidden_states_need_the_teacher_online():
    terms = {"h": {"_target_": "distill.terms.HiddenStates", "weight": 1.0, "layers": {0: 0}}}
    for outputs in ("cached", "hidden", "sampled"):
        with pytest.raises(
            UserError, match=f"teacher.outputs is {outputs}.*teacher.outputs=online"
        ):
            checked(loss={"terms": terms}, teacher={"outputs": outputs})
    assert checked(loss={"terms": terms}, teacher={"outputs": "online"}).loss.terms == terms


@pytest.mark.parametrize(
    "key", ["loss.alhpa", "optimizer.lrr", "evaluate.request", "teacher.finetune.epoch"]
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key):
    changes = OmegaConf.from_dotlist([f"{key}=1"])
    with pytest.raises(OmegaConfBaseException) as refused:
        OmegaConf.merge(OmegaConf.structured(Run), TINY, changes)
    assert f"{key} is given, but there is no such key: did you mean" in explain.explain_error(
        refused.value
    )


def test_a_key_added_by_force_is_refused():
    composed = OmegaConf.merge(OmegaConf.structured(Run), {"name": "x"}, TINY)
    OmegaConf.set_struct(composed, False)
    OmegaConf.update(composed, "loss.gamma", 1, force_add=True)
    with pytest.raises(OmegaConfBaseException, match="gamma"):
        compose.validate(composed)


def test_the_user_s_recipes_folder_wins(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"seed": 7}))
    monkeypatch.chdir(tmp_path)
    assert compose.load_recipe("tiny").seed == 7


def test_a_saved_run_is_the_same_recipe(tmp_path):
    run = checked(loss={"alpha": 0.25})
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    assert compose.load_recipe(str(tmp_path / "recipe.yaml")) == run


def test_a_saved_run_names_local_files_by_their_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.csv").write_text("text,label\n")
    run = checked(data={"source": "texts.csv"})
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    assert compose.load_recipe(str(tmp_path / "recipe.yaml")).data.source == str(
        tmp_path / "texts.csv"
    )


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises((UserError, OmegaConfBaseException)):
        compose.load_recipe(str(file))


def test_recipe_files_of_one_name_are_two_recipes(tmp_path):
    arguments = []
    for alpha in (0.25, 0.75):
        file = tmp_path / str(alpha) / "recipe.yaml"
        compose.save_recipe(checked(loss={"alpha": alpha}), file)
        arguments.append(str(file))
    _, understood = hydra_config.register_recipes(["-m", f"recipe={','.join(arguments)}"])
    names = understood.removeprefix("recipe=").split(",")
    store = ConfigStore.instance()
    assert [store.load(f"recipe/{name}.yaml").node.loss.alpha for name in names] == [0.25, 0.75]


def test_another_broken_recipe_in_the_folder_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert hydra_config.register_recipes(["recipe=tiny"]) == ["recipe=tiny"]
    with pytest.raises(UserError, match="broken"):
        hydra_config.register_recipes(["recipe=broken"])


def test_saving_does_not_change_the_run(tmp_path, monkeypatch):
    """A split may have the name of a folder that happens to be here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extra").mkdir()
    run = checked(data={"unlabelled": "extra"})
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    assert (
        run.data.unlabelled
        == compose.load_recipe(str(tmp_path / "recipe.yaml")).data.unlabelled
        == "extra"
    )


SECTIONS = [
    section
    for section in vars(config).values()
    if inspect.isclass(section) and is_dataclass(section)
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_documented(section):
    hints, docs = get_type_hints(section), help.field_docs(section)
    for field in fields(section):
        documented = any(
            is_dataclass(kind) for kind in (hints[field.name], *get_args(hints[field.name]))
        )
        assert documented or docs[field.name]


def test_help_shows_each_key_with_its_default_and_documentation():
    lines = help.key_table().splitlines()
    (line,) = (line for line in lines if line.startswith("  alpha: 0.5 "))
    assert line.endswith(help.field_docs(config.Loss)["alpha"])
    assert max(map(len, lines)) <= 110


def test_a_stored_recipe_names_files_of_every_key_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    run = compose.load_recipe("tiny")
    run.task |= {"template": "chat.jinja"}
    run.evaluate.harness_path = "tasks"
    stored = compose.with_absolute_paths(run)
    assert stored.task["template"] == str(tmp_path / "chat.jinja")
    assert stored.evaluate.harness_path == str(tmp_path / "tasks")
    run.task |= {"template": "{{ messages }}" * 400}  # longer than a name may be
    assert compose.with_absolute_paths(run).task == run.task
