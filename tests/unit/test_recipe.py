from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError
from distill.recipe import compose
from distill.recipe.config import Run

TINY = yaml.safe_load((compose.SHIPPED / "tiny.yaml").read_text())


def checked(**changes):
    return compose.validate(
        OmegaConf.merge(OmegaConf.structured(Run), {"name": "x"}, TINY, changes)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"alpha": 1.5}}, ["loss.alpha is 1.5", "[0, 1]"]),
        ({"loss": {"temperature": 0}}, ["loss.temperature is 0", "above 0"]),
        ({"loss": {"divergence": "forward_lk"}}, ["forward_lk", "did you mean forward_kl"]),
        ({"loss": {"divergence": "nowhere.at_all"}}, ["nowhere"]),
        ({"loss": {"terms": {"h": {"weight": 1.0}}}}, ["loss.terms.h._target_ is None"]),
        ({"teacher": {"outputs": "catched"}}, ["teacher.outputs is catched", "cached, online"]),
        (
            {"teacher": {"outputs": "sampled"}, "loss": {"divergence": "reverse_kl"}},
            ["is reverse_kl", "teacher.outputs=hidden"],
        ),
        (
            {"teacher": {"outputs": "top_k"}, "loss": {"divergence": "logit_mse"}},
            ["is logit_mse", "outputs=top_k"],
        ),
        ({"teacher": {"tokens": 65}}, ["teacher.tokens is 65", "[1, 64]"]),
        ({"loss": {"chunk": -1}}, ["loss.chunk is -1", "at least 0"]),
        ({"teacher": {"model": "x"}}, ["exactly one of model and config"]),
        ({"teacher": None}, ["student.layers is [0, 2]", "no teacher"]),
        ({"student": {"layers": None, "architecture": None}}, ["exactly one"]),
        ({"data": {"text": ["a", "b", "c"]}}, ["data.text is ['a', 'b', 'c']"]),
        ({"data": {"text": ["a", "a"]}}, ["data.text is ['a', 'a']", "another column"]),
        ({"data": {"text": ["label"]}}, ["data.label is label", "another column"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"trainer": {"epochs": float("inf")}}, ["trainer.epochs is inf"]),
        ({"loss": {"beta": 1.0}}, ["loss.beta is 1"]),
        (
            {"loss": {"terms": {"loss": {"_target_": "distill.terms.HiddenStates"}}}},
            ["loss.terms has 'loss'"],
        ),
        ({"teacher": {"dtype": "fp8"}}, ["teacher.dtype is fp8", "auto, float32"]),
        (
            {"trainer": {"strategy": "fsdp", "compile": True}},
            ["trainer.compile is true", "trainer.strategy=fsdp"],
        ),
        (
            {"trainer": {"accumulate": 3}, "data": {"batch_size": 2}},
            ["trainer.accumulate is 3", "data.batch_size is 2"],
        ),
        (
            {"trainer": {"strategy": "fsdp", "precision": "16-mixed"}},
            ["trainer.precision is 16-mixed", "trainer.strategy=fsdp"],
        ),
        (
            {"callbacks": {"c": {"_target_": "distill.terms.HiddenStates"}}},
            ["callbacks.c.weight is not given"],
        ),
        ({"data": {"batch_size": 0}}, ["data.batch_size is 0"]),
        ({"tokenizer": {"model": "x"}}, ["tokenizer.model is x", "only one"]),
        ({"task": {"max_lenght": 8}}, ["task.max_lenght", "did you mean max_length"]),
        ({"callbacks": {"c": {"_target_": "nodots"}}}, ["callbacks.c._target_ is nodots"]),
        ({"trainer": {"precision": "fp8"}}, ["trainer.precision is fp8"]),
    ],
)
def test_a_refused_value_is_named_with_the_rule(changes, words):
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
    assert f"{key} is given, but there is no such key: did you mean" in compose.explain_error(
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
    _, understood = compose.register_recipes(["-m", f"recipe={','.join(arguments)}"])
    names = understood.removeprefix("recipe=").split(",")
    store = ConfigStore.instance()
    assert [store.load(f"recipe/{name}.yaml").node.loss.alpha for name in names] == [0.25, 0.75]


def test_another_broken_recipe_in_the_folder_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert compose.register_recipes(["recipe=tiny"]) == ["recipe=tiny"]
    with pytest.raises(UserError, match="broken"):
        compose.register_recipes(["recipe=broken"])


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
