"""Hydra's configuration of ``distill.train``, with recipes as choices of the key `recipe`."""

import re
import zlib
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import ListConfig, OmegaConf

from distill.errors import UserError
from distill.recipe.arguments import (
    HELP_FLAGS,
    INFO_FLAGS,
    empty_sections,
    flags_first,
    quote_non_ascii,
)
from distill.recipe.compose import available_recipes, read_recipe
from distill.recipe.config import Run
from distill.recipe.help import key_table
from distill.recipe.targets import did_you_mean

__all__ = ["register_recipes"]

# keys below these are arguments of a class or config, which are not in the schema
_FREE_KEYS = re.compile(r"(task|callbacks|loss\.terms|teacher\.config|student\.config)[.=]")
_HELP = """Distill a Transformers model into a smaller one, measure both, export the student.

  python -m distill.train recipe=NAME [key=value ...]     one run; recipe=FILE.yaml works too
  python -m distill.train -m recipe=A,B key=1,2           every combination
  python -m distill.train resume=FOLDER [key=value ...]   continue a run; resume=last: the newest
  python -m distill.train --cfg job recipe=NAME           print the recipe with all its values

Recipes: {recipes}

Keys and their defaults. A recipe sets some of them, and key=value on the command line overrides it.

{keys}
"""
_LOGGING = {
    "version": 1,
    "formatters": {
        "plain": {"format": "%(message)s"},
        "stamped": {"format": "%(asctime)s %(levelname)s %(message)s"},
    },
    "filters": {
        "console": {"()": "distill.cli.ConsoleFilter"},
        "references": {"()": "distill.recipe.references.HideValues"},
    },
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "filters": ["console", "references"],
            "level": "INFO",
            "stream": "ext://sys.stderr",
        },
        "file": {
            "class": "logging.FileHandler",
            "formatter": "stamped",
            "filters": ["references"],
            "filename": "${hydra.runtime.output_dir}/train.log",
            "delay": True,
        },
    },
    "loggers": {"distill": {"level": "DEBUG"}},
    "root": {"level": "WARNING", "handlers": ["console", "file"]},
    "disable_existing_loggers": False,
}


def register_recipes(arguments: list[str]) -> list[str]:
    """Register the schema and the recipes of a command line with Hydra.

    Args:
        arguments: command-line arguments as the user typed them.

    Returns:
        The arguments for Hydra: recipe files replaced by their registered names, and ``++``
        before keys that are not in the schema.

    Raises:
        UserError: if no recipe is named, or if it does not exist.
    """
    arguments, recipes = flags_first(arguments), available_recipes()
    if not any(argument.startswith("recipe=") or argument in INFO_FLAGS for argument in arguments):
        raise UserError(
            "recipe is not given, but a run needs one: add recipe= and "
            f"one of {', '.join(recipes)}, or a YAML file"
        )
    help_text = _help(recipes) if any(flag in arguments for flag in HELP_FLAGS) else ""
    store = ConfigStore.instance()
    store.store(name="schema", node=Run)
    store.store(name="run", node=empty_sections(arguments) | _primary_config(help_text))
    OmegaConf.register_new_resolver("run_name", _check_name, replace=True)
    return [_hydra_argument(argument, recipes) for argument in arguments]


def _help(recipes: dict[str, Path]) -> str:
    """The text of ``--help``, for `string.Template`."""
    return _HELP.format(recipes=", ".join(recipes), keys=key_table()).replace("$", "$$")


def _primary_config(help_text: str) -> dict[str, Any]:
    return {
        "defaults": ["schema", {"recipe": None}, "_self_"],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "runs/${run_name:${name}}/${now:%Y-%m-%d_%H-%M-%S}"},
            "sweep": {"dir": "runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "${hydra.job.num}"},
            "help": {"template": help_text},
            "job_logging": _LOGGING,
        },
    }


def _hydra_argument(argument: str, recipes: dict[str, Path]) -> str:
    if argument.startswith("="):
        raise UserError(f"the argument is {argument}, but it must be key=value: add the key")
    if argument.startswith("-"):
        return argument
    if not argument.startswith("recipe="):
        quoted = quote_non_ascii(argument)
        return f"++{quoted}" if _FREE_KEYS.match(argument) else quoted
    value = argument.removeprefix("recipe=")
    # a name may have commas
    is_one = value in recipes or Path(value).is_file()
    values = [value] if is_one else value.split(",")
    return f"recipe={','.join(_register(name, recipes) for name in values)}"


def _bases(defaults: Any, recipe: str) -> list[str]:
    """The recipes that a recipe builds on; UserError if it does not list their names."""
    if not isinstance(defaults, ListConfig) or not all(isinstance(base, str) for base in defaults):
        raise UserError(
            f"defaults of recipe {recipe} is {defaults}, but it must list names of recipes: "
            "write [name, _self_]"
        )
    return list(defaults)


def _check_name(name: Any) -> str:
    """The name of a run as the name of a folder; UserError if it leads to another folder."""
    if Path(str(name)).name != str(name) or str(name) == "..":
        raise UserError(
            f"name is {name}, but the folder of a run is runs/<name>/<time>: "
            "choose a name without / and .., or set hydra.run.dir on the command line"
        )
    return str(name)


def _register(recipe: str, recipes: dict[str, Path], above: tuple[str, ...] = ()) -> str:
    """Register a recipe and the recipes it builds on; returns its name for Hydra."""
    if recipe in above:
        raise UserError(
            f"recipe {recipe} builds on itself ({' -> '.join([*above, recipe])}), but that never "
            "ends: remove it from the defaults of one of them"
        )
    name, file = recipe, recipes.get(recipe)
    if re.search(r"\.ya?ml$", recipe):
        file = Path(recipe)
        if not file.is_file():
            raise UserError(
                f"recipe is {recipe}, but there is no such file: give the path of a YAML file, "
                f"or one of {', '.join(recipes)}"
            )
    elif file is None:
        suggestion = did_you_mean(recipe, list(recipes))
        raise UserError(f"recipe is {recipe or 'empty'}, but there is no such recipe: {suggestion}")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        # two files may have the same stem, and Hydra's grammar knows ASCII only
        name = f"file_{zlib.crc32(recipe.encode()):08x}"
    node = read_recipe(file)
    if "defaults" in node:
        node.defaults = [
            base if base == "_self_" else _register(base, recipes, (*above, recipe))
            for base in _bases(node.defaults, recipe)
        ]
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")
    return name
