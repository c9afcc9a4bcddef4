"""What the documents tell a user to type is accepted, and what they list is what there is."""

import ast
import re

import pytest
import yaml
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from distill import corpora, evaluate, export, losses
from distill.recipe import compose, config, targets
from tests.unit.tiny_runs import run_here
from tests.worlds import world

ROOT = compose.PACKAGE.parent
DOCUMENTS = sorted(
    file.relative_to(ROOT)
    for pattern in ("*.md", "recipes/*.md", "distill/*/*.md", "scripts/*.md", "tests/*.md")
    for file in [*ROOT.glob(pattern), *ROOT.glob(".github/*.md")]
)
README = (ROOT / "README.md").read_text()
COMMAND = r"(?:python -m distill\.|\bdistill )(train|evaluate|export)((?: +-?[\w.\-/<>=,]+)*)"
PLACEHOLDERS = ("recipe=mine", "recipe=NAME", "recipe=FILE.yaml", "recipe=...")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def over_documents(find):
    """One case for each match in each document, named by the document."""
    found = [(name, match) for name in dict.fromkeys(DOCUMENTS) for match in find(name)]
    return [pytest.param(name, match, id=f"{name}-{n}") for n, (name, match) in enumerate(found)]


def in_blocks(language):
    return over_documents(lambda name: blocks((ROOT / name).read_text(), language))


def test_the_two_commands_are_there():
    assert 'pip install -e ".[demo]" && python -m distill.train recipe=bert_to_distil\n' in README
    assert 'pip install -e ".[test]" && pytest\n' in README


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


def test_every_recipe_has_a_row_of_results():
    table = (ROOT / "recipes" / "README.md").read_text()
    for file in compose.SHIPPED.glob("*.yaml"):
        assert re.search(rf"^\| `{file.stem}` \|", table, re.MULTILINE), file.stem


def test_every_divergence_is_named():
    for name in {*losses.ONE_OF_C, *losses.ANY_OF_C, *losses.NUMBERS}:
        assert f"`{name}`" in README


def test_the_readme_s_recipe_is_accepted():
    text = next(block for block in blocks(README, "yaml") if "_target_: distill.tasks" in block)
    schema, name = OmegaConf.structured(config.Run), {"name": "mine"}
    run = compose.validate(OmegaConf.merge(schema, name, yaml.safe_load(text)))
    assert run.data.source == "reviews.csv"


@pytest.mark.parametrize(("document", "block"), in_blocks("yaml"))
def test_every_target_takes_its_arguments(document, block):
    def check(key, value):
        if isinstance(value, dict):
            if str(value.get("_target_", "")).startswith("distill."):
                targets.check_target(key, value)
            for name, inner in value.items():
                check(f"{key}.{name}", inner)

    check(str(document), yaml.safe_load(block))


@pytest.mark.parametrize(("document", "block"), in_blocks("python"))
def test_python_is_python(document, block):
    ast.parse(block)


@pytest.mark.parametrize(
    ("document", "command"),
    over_documents(lambda name: re.findall(COMMAND, (ROOT / name).read_text())),
)
def test_the_keys_of_every_command_exist(document, command):
    module, arguments = command
    schema = {"train": config.Run, "evaluate": evaluate.Options, "export": export.Options}[module]
    for argument in arguments.split():
        if argument.startswith("recipe=") and module == "train":
            known = argument.removeprefix("recipe=") in compose.available_recipes()
            assert known or argument in PLACEHOLDERS
        elif "=" in argument and not argument.startswith(("resume=", "hydra.", "-")):
            key, value = argument.split("=", 1)
            keys = OmegaConf.structured(schema)
            if schema is config.Run:
                keys.student = config.Student(model="any")
            OmegaConf.update(keys, key, yaml.safe_load(value.split(",")[0]))


@pytest.mark.parametrize(
    ("document", "link"),
    over_documents(lambda name: re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())),
)
def test_every_link_leads_to_a_file(document, link):
    assert ((ROOT / document).parent / link).exists()


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    """What a user has: models, a tokenizer and a dataset, in a folder of their own."""
    made, dataset = world(), corpora.generated()
    encoded = dataset["train"].map(
        made.tokenizer, input_columns="text", fn_kwargs={"truncation": True, "max_length": 24}
    )
    encoded = encoded.select_columns(["input_ids", "attention_mask", "label"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.isolated.run_isolated", run_here)
    return {
        "teacher": made.model(),
        "student": made.model("student", seed=1),
        "tokenizer": made.tokenizer,
        "dataset": dataset,
        "label_names": dataset["train"].features["label"].names,
        "loader": DataLoader(encoded, 16, collate_fn=DataCollatorWithPadding(made.tokenizer)),
    }


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on a Trainer with its defaults
@pytest.mark.parametrize("marker", ["distill_model(", "L.Trainer("])
def test_the_readme_s_python_runs(marker, in_memory, tmp_path):
    (block,) = [block for block in blocks(README, "python") if marker in block]
    assert len(block.splitlines()) <= 15
    exec(compile(block, "README.md", "exec"), in_memory)
    assert [*tmp_path.rglob("model.safetensors")]
