"""What the README tells a user to type is accepted, and what it lists is what there is."""

import ast
import re

import pytest
import yaml
from omegaconf import OmegaConf

from distill import evaluate, export, losses
from distill.recipe import compose, config, targets

README = (compose.PACKAGE.parent / "README.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"python -m distill\.(\w+)((?: +-?[\w.\-/<>=,]+)*)", README)


def test_sections_come_in_their_order():
    wanted = [
        "# distill",
        "Two commands",
        "What they print",
        "A recipe of your own",
        "Every recipe",
        "Resume",
        "Evaluate",
        "Export",
        "How to add",
    ]
    places = [README.index(title if title.startswith("#") else f"\n## {title}") for title in wanted]
    assert places == sorted(places)


def test_the_two_commands_are_there():
    assert 'pip install -e ".[demo]" && python -m distill.train recipe=bert_to_distil\n' in README
    assert 'pip install -e ".[test]" && pytest\n' in README


def test_every_recipe_is_in_the_table():
    for file in compose.SHIPPED.glob("*.yaml"):
        assert re.search(rf"^\| `{file.stem}` \|", README, re.MULTILINE), file.stem


def test_every_divergence_is_named():
    for name in {*losses.ONE_OF_C, *losses.ANY_OF_C, *losses.NUMBERS}:
        assert f"`{name}`" in README


def test_the_recipe_of_one_s_own_is_accepted():
    own = next(block for block in YAML if "_target_: distill.tasks" in block)
    run = compose.validate(
        OmegaConf.merge(OmegaConf.structured(config.Run), {"name": "mine"}, yaml.safe_load(own))
    )
    assert run.data.source == "reviews.csv"


@pytest.mark.parametrize("block", YAML)
def test_every_target_takes_its_arguments(block):
    def check(where, value):
        if isinstance(value, dict):
            if "_target_" in value:
                targets.check_target(where, value)
            for key, inner in value.items():
                check(f"{where}.{key}", inner)

    check("README", yaml.safe_load(block))


@pytest.mark.parametrize("block", PYTHON)
def test_python_is_python(block):
    ast.parse(block)


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_the_keys_of_every_command_exist(module, arguments):
    schema = {"train": config.Run, "evaluate": evaluate.Options, "export": export.Options}[module]
    for argument in arguments.split():
        if "=" in argument and not argument.startswith(("recipe=", "resume=", "hydra.", "-")):
            key, value = argument.split("=", 1)
            OmegaConf.update(OmegaConf.structured(schema), key, yaml.safe_load(value.split(",")[0]))
        elif argument.startswith("recipe=") and argument not in ("recipe=mine", "recipe=NAME"):
            assert argument.removeprefix("recipe=") in compose.available_recipes()
