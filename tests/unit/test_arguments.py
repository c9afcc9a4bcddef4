"""Command lines of distill.train -> Hydra's configuration, for every way to write them."""

import re

import pytest
import yaml
from hydra import compose, initialize
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError
from distill.recipe import arguments, explain, hydra_config
from distill.recipe.compose import validate
from distill.recipe.config import Run

RECIPE = """\
task: {_target_: distill.tasks.SingleLabelClassification}
data: {source: distill.corpora.generated}
student: {model: nowhere}
loss: {alpha: 1.0}
"""


def composed(*words):
    """The configuration that distill.train gets from a command line."""
    overrides = hydra_config.register_recipes(list(words))
    with initialize(version_base="1.3", config_path=None):
        return compose("run", overrides)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return "recipe=mine.yaml"


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("teacher.model=x", "teacher.model", "x"),
        ("teacher.finetune.epochs=2", "teacher.finetune.epochs", 2.0),
        ("teacher.finetune={epochs: 2}", "teacher.finetune.epochs", 2.0),
        ("teacher={model: x}", "teacher.model", "x"),
        ("student.config.model_type=bert", "student.config.model_type", "bert"),
        ("teacher.config.model_type=bert", "teacher.config.model_type", "bert"),
        ("tokenizer.model=x", "tokenizer.model", "x"),
    ],
)
def test_keys_of_sections_that_are_null_can_be_set(argument, key, value, recipe):
    assert OmegaConf.select(composed(recipe, argument), key) == value


def test_sections_that_no_argument_names_stay_null(recipe):
    assert composed(recipe, "loss.alpha=0.5").teacher is None
    assert composed(recipe, "teacher=null").teacher is None


# Control characters and surrogates are no text of a command line.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12)


def parsed(argument):
    """The value that Hydra reads from an argument."""
    return OverridesParser.create().parse_override(arguments.quote_non_ascii(argument)).value()


@settings(max_examples=50, deadline=None)
@given(text=TEXTS.filter(lambda text: text.strip() == text and not text.isascii()))
def test_any_letters_can_be_in_a_value(text):
    assert parsed(f"data.source={arguments.quote(text)}") == text
    if not set(text) & set("'\"\\,()[]{}$:="):
        assert parsed(f"data.source={text}") == text
        assert parsed(f"data.labels=[{text}, b]") == [text, "b"]


@pytest.mark.parametrize("stem", ["größe", "日本", "a b", "a=b", "a,[1]", "it's", '"x"', "a(b)"])
def test_any_letters_can_be_in_the_name_of_a_recipe(stem, recipe, tmp_path):
    (tmp_path / "recipes").mkdir()
    for file in (tmp_path / f"{stem}.yaml", tmp_path / "recipes" / f"{stem}.yaml"):
        file.write_text(RECIPE)
    overrides = hydra_config.register_recipes([f"recipe={stem}"])
    assert overrides == hydra_config.register_recipes([f"recipe={stem}"])
    assert parsed(overrides[0]).isascii()
    assert composed(f"recipe={stem}.yaml").name == stem


@pytest.mark.parametrize("words", [["recipe=tiny", "--cfg", "job"], ["--cfg=job", "recipe=tiny"]])
def test_flags_may_be_anywhere(words):
    assert arguments.flags_first(words) == ["--cfg", "job", "recipe=tiny"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--foo"], "--foo"),
        (["-x"], "-x"),
        (["--cfg"], "not given"),
        (["--cfg", "jobs"], "jobs"),
        (["--experimental-rerun", "config.pickle"], "--experimental-rerun"),  # reads a pickle
        (["--config-dir=/tmp"], "--config-dir"),
    ],
)
def test_other_flags_are_refused(words, value):
    with pytest.raises(UserError, match=value):
        arguments.flags_first(["recipe=tiny", *words])


VALUES = ("3", "null", "x", "''", "[1, 2]", "{a: 1}", "{a: {b: [1]}}", "-1", ".nan", "true", "{}")


def keys(section=Run, prefix=""):
    """All keys of the schema, those of sections included."""
    for name, node in OmegaConf.structured(section)._content.items():
        yield f"{prefix}{name}"
        kind = node._metadata.ref_type
        if hasattr(kind, "__dataclass_fields__"):
            yield from keys(kind, f"{prefix}{name}.")


@settings(max_examples=25, deadline=None)
@given(key=st.sampled_from(sorted(keys())), value=st.sampled_from(VALUES))
def test_a_value_of_another_kind_is_one_sentence(key, value):
    try:
        sections = arguments.empty_sections([f"{key}={value}"])
        parts = (OmegaConf.structured(Run), OmegaConf.create(RECIPE), {"name": "mine"}, sections)
        recipe = OmegaConf.merge(*parts)
        OmegaConf.update(recipe, key, yaml.safe_load(value))
        validate(recipe)
    except (UserError, OmegaConfBaseException) as error:
        sentence = explain.explain_error(error)
        assert "\n" not in sentence
        assert set(key.split(".")) & set(re.findall(r"\w+", sentence))


@pytest.mark.parametrize(
    "text",
    ["nonsense", "a b=1", "loss.alpha=[1", "=3", "loss..alpha=1", "loss.alpha='", "~no", "+"],
)
def test_a_malformed_argument_is_one_sentence(text, recipe):
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as error:
        composed(recipe, text)
    sentence = explain.explain_error(error.value)
    assert "\n" not in sentence
    assert text.lstrip("~+=").partition("=")[0] in sentence


def test_recipes_that_build_on_each_other_are_refused(recipe, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, base in (("a", "b"), ("b", "a"), ("c", "c")):
        (folder / f"{name}.yaml").write_text(f"defaults: [{base}, _self_]\n")
    for name in "ac":
        with pytest.raises(UserError, match=f"recipe {name} builds on itself"):
            composed(f"recipe={name}")


NINE = ",".join("123456789")
FILES = {
    "aliases": f"a0: &a0 [{NINE}]\n"
    + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "cycle": "a: &a [*a]\n",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "tag": "a: !!python/object/apply:os.system ['touch executed']\n",
    "hydra": "hydra: {job_logging: {}}\n",
    "resolver": "name: ${oc.decode:x}\n",
    "list": "[1, 2]\n",
    "bytes": "\x00\x01",
    "large": "a: " + "x" * 2_000_000,
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_hostile_file_is_one_sentence(text, recipe, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml|name is") as error:
        composed("recipe=bad.yaml")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "/tmp/x"])
def test_the_name_of_a_run_stays_in_its_folder(name):
    with pytest.raises(UserError, match="name is"):
        hydra_config._check_name(name)
