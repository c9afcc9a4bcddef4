"""Every shipped recipe: complete, checked, headed by its own command, and buildable."""

import pytest
import yaml

from distill import data, models
from distill.errors import UserError
from distill.prepare import prepare_run
from distill.recipe import compose
from distill.tasks import build_task

RECIPES = sorted(compose.SHIPPED.glob("*.yaml"))
OFFLINE = ["bert_to_distil", "gpt2_half", "tiny"]
named = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)


@named
def test_a_recipe_is_checked_and_builds_its_task(file):
    run = compose.load_recipe(file.stem)
    assert run.name == file.stem
    build_task(run.task)


@named
def test_a_recipe_says_how_to_run_it(file):
    first, second, *_ = file.read_text().splitlines()
    assert first == f"# python -m distill.train recipe={file.stem}"
    assert second.startswith("# ")


@named
def test_a_recipe_is_one_screen_in_the_order_of_the_data(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 40
    order = list(compose.Run.__dataclass_fields__)
    places = [order.index(key) for key in yaml.safe_load(text)]
    assert places == sorted(places)


@pytest.mark.parametrize("name", OFFLINE)
def test_an_offline_recipe_has_its_data_and_models_here(name):
    run = compose.load_recipe(name)
    made = prepare_run(run)
    models.load(run.teacher.model, run.teacher.config, made.task, "teacher", made.tokenizer)


def test_a_recipe_of_the_hub_says_what_could_not_be_reached():
    run = compose.load_recipe("bert_to_distil_sst2")
    with pytest.raises(UserError) as refused:
        data.load(run.data, build_task(run.task), run.seed)
    assert "nyu-mll/glue" in str(refused.value)
    assert "local" in str(refused.value)
