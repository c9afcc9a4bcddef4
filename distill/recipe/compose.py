"""recipe -> `Run`: finds recipe files, lays them over the schema, and refuses what does not fit.

A recipe is named (`recipe=bert_to_distil`) or given as a file (`recipe=mine.yaml`). Names are those of the shipped
`recipes/*.yaml` and of a folder `recipes` where the command is run, which wins.
"""

import copy
import re
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill import store
from distill.errors import UserError
from distill.recipe import capabilities, targets
from distill.recipe.config import SPARSE, Loss, Run

PACKAGE = Path(__file__).parents[1]
SHIPPED = next(
    folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir()
)

OPEN = re.compile(
    r"(task|callbacks|loss\.terms|teacher\.config|student\.config)[.=]"
)  # their keys are those of the class they name
ASKS = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--info",
    "-i",
    "--cfg",
    "-c",
    "--shell-completion",
    "-sc",
)

HELP = """Distils a Transformers model into a smaller one, measures both and exports the student.

  python -m distill.train recipe=NAME [key=value ...]     one run; recipe=FILE.yaml works too
  python -m distill.train -m recipe=A,B key=1,2           every combination
  python -m distill.train resume=FOLDER [key=value ...]   go on with a run that was cut short; resume=last finds the newest

Recipes: {recipes}

Keys and their defaults; a recipe sets some of them, key=value on the command line wins:

$CONFIG
"""


def available_recipes() -> dict[str, Path]:
    """The recipes that can be named here."""
    folders = [SHIPPED, Path.cwd() / "recipes"]
    return {
        file.stem: file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.glob("*.yaml"))
    }


def read_recipe(file: Path) -> DictConfig:
    """One recipe file, as it stands; its name is its file's unless it gives one."""
    try:
        recipe = OmegaConf.load(file)
    except Exception as error:
        raise UserError(
            f"recipe {file} cannot be read ({' '.join(str(error).split())}), but it must be a YAML file of keys: correct it"
        ) from error
    if not isinstance(recipe, DictConfig):
        raise UserError(
            f"recipe {file} holds {type(recipe).__name__}, but it must be a YAML file of keys: see {SHIPPED}"
        )
    return OmegaConf.merge({"name": file.stem}, recipe)  # type: ignore[return-value]


def register_recipes(arguments: list[str]) -> list[str]:
    """Make the named recipes choices of Hydra's, and return the command line with recipe files replaced by names."""
    named = available_recipes()
    if not any(argument.startswith("recipe=") or argument in ASKS for argument in arguments):
        raise UserError(
            f"recipe is not given, but a run needs one: add recipe= and one of {', '.join(named)}, or a YAML file"
        )
    store = ConfigStore.instance()
    store.store(name="schema", node=Run)
    store.store(name="run", node=_primary(", ".join(named)))
    return [_understood(argument, named) for argument in arguments]


def _understood(argument: str, named: dict[str, Path]) -> str:
    """An argument as Hydra wants it: recipe files become names, and open keys may be new ones."""
    if argument.startswith("="):
        raise UserError(f"the argument is {argument}, but it must be key=value: say which key")
    if not argument.startswith("recipe="):
        return f"++{argument}" if OPEN.match(argument) else argument
    given = argument.removeprefix("recipe=")
    values = [given] if Path(given).is_file() else given.split(",")
    return f"recipe={','.join(_stored(value, named) for value in values)}"


def _stored(value: str, named: dict[str, Path]) -> str:
    """Make one recipe, and those that it builds on, a choice of Hydra's; returns its name there."""
    name, file = value, named.get(value)
    if re.search(r"\.ya?ml$", value):
        file = Path(value)
        if not file.is_file():
            raise UserError(
                f"recipe is {value}, but there is no such file: give the path of a YAML file, or one of {', '.join(named)}"
            )
        name = re.sub(r"\W", "_", value)  # two files may have the same stem
    elif file is None:
        raise UserError(
            f"recipe is {value or 'empty'}, but there is no such recipe: {targets.did_you_mean(value, list(named))}"
        )
    recipe = read_recipe(file)
    for base in recipe.get("defaults", []):
        if base != "_self_":
            _stored(str(base), named)
    ConfigStore.instance().store(group="recipe", name=name, node=recipe, package="_global_")
    return name


def _primary(names: str) -> dict[str, Any]:
    plain = {"format": "%(message)s"}
    stamped = {"format": "%(asctime)s %(levelname)s %(message)s"}
    handlers = {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "level": "INFO",
            "stream": "ext://sys.stderr",
        },
        "file": {
            "class": "logging.FileHandler",
            "formatter": "stamped",
            "filename": "${hydra.runtime.output_dir}/train.log",
            "delay": True,
        },
    }
    return {
        "defaults": ["schema", {"recipe": None}, "_self_"],
        "hydra": {
            "output_subdir": None,
            "run": {"dir": "runs/${name}/${now:%Y-%m-%d_%H-%M-%S}"},
            "sweep": {"dir": "runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "${hydra.job.num}"},
            "help": {"template": HELP.format(recipes=names)},
            "job_logging": {
                "version": 1,
                "formatters": {"plain": plain, "stamped": stamped},
                "handlers": handlers,
                "loggers": {"distill": {"level": "DEBUG"}},
                "root": {"level": "WARNING", "handlers": ["console", "file"]},
                "disable_existing_loggers": False,
            },
        },
    }


def load_recipe(name: str) -> Run:
    """The run that a recipe file, or a recipe of that name, describes, with nothing overridden."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else available_recipes().get(name)
    if file is None or not file.is_file():
        raise UserError(
            f"recipe is {name}, but there is no such recipe: {targets.did_you_mean(name, list(available_recipes()))}"
        )
    recipe = read_recipe(file)
    if bases := recipe.pop("defaults", None):
        raise UserError(
            f"recipe {name} builds on {list(bases)}, but only distill.train composes recipes: give the recipe.yaml of its run folder"
        )
    composed = OmegaConf.merge(OmegaConf.structured(Run), recipe)
    assert isinstance(composed, DictConfig)
    return validate(composed)


def validate(composed: DictConfig) -> Run:
    """The composed recipe as plain dataclasses, with every key and `_target_` checked."""
    missing = OmegaConf.missing_keys(composed)
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing))} is not given, but recipe {composed.name} cannot do without: set it in the recipe"
        )
    run = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.to_container(composed))
    )  # refuses keys added with +
    assert isinstance(run, Run)
    run.callbacks = {
        name: spec for name, spec in run.callbacks.items() if spec is not None
    }  # `callbacks.x=null` drops one of a recipe's
    named = {"task": run.task} | {f"loss.terms.{key}": spec for key, spec in run.loss.terms.items()}
    for where, spec in (
        named | {f"callbacks.{key}": spec for key, spec in run.callbacks.items()}
    ).items():
        targets.check_target(where, spec)
    _check_together(run)
    return run


def with_absolute_paths(run: Run) -> Run:
    """The run with its local paths made absolute."""
    saved = copy.deepcopy(run)
    for section, key in (
        (saved.data, "source"),
        (saved.tokenizer, "model"),
        (saved.teacher, "model"),
        (saved.student, "model"),
    ):
        value = getattr(section, key, None)
        if value is not None and Path(value).exists():
            setattr(section, key, str(Path(value).absolute()))
    if (
        saved.data.unlabelled is not None and Path(saved.data.unlabelled).is_file()
    ):  # a bare name may be a split's
        saved.data.unlabelled = str(Path(saved.data.unlabelled).absolute())
    return saved


def save_recipe(run: Run, file: Path) -> None:
    """The run as a recipe of its own, which gives the same weights again."""
    text = OmegaConf.to_yaml(OmegaConf.structured(with_absolute_paths(run)))
    store.write_file(file, f"# python -m distill.train recipe={file.absolute()}\n{text}".encode())


def quote_override(text: str) -> str:
    """A string as Hydra's command line wants it, where a backslash is special before a quote alone."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _check_together(run: Run) -> None:
    """Rules between sections."""
    capabilities.check(
        run.callbacks, run.export.format, run.export.dtype, run.export.quantize, run.export.bits
    )
    if run.loss.divergence is not None:
        path = run.loss.divergence
        targets.read_signature(path if "." in path else f"distill.losses.{path}")
    if run.teacher is None and run.student.layers is not None:
        raise UserError(
            f"student.layers is {run.student.layers}, but there is no teacher to cut them from: set teacher.model"
        )
    if run.teacher is None and run.loss.alpha < 1:
        raise UserError(
            f"loss.alpha is {run.loss.alpha:g}, but there is no teacher to learn from: set teacher.model, or loss.alpha=1"
        )
    if run.teacher is not None:
        _check_outputs(run.teacher.outputs, run.loss)
    if run.teacher is None and run.loss.terms:
        raise UserError(
            f"loss.terms is {', '.join(run.loss.terms)}, but there is no teacher to compare with: set teacher.model"
        )
    if run.trainer.strategy == "fsdp" and run.trainer.compile:
        raise UserError(
            "trainer.compile is true, but trainer.strategy=fsdp gathers each block as it is needed: leave trainer.compile out"
        )
    if run.trainer.accumulate > run.data.batch_size:
        raise UserError(
            f"trainer.accumulate is {run.trainer.accumulate}, but data.batch_size is {run.data.batch_size}: "
            "a micro-batch needs an example, so lower it"
        )
    if run.trainer.strategy == "fsdp" and run.trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision is 16-mixed, but trainer.strategy=fsdp scales no losses: set trainer.precision=bf16-mixed"
        )


def _check_outputs(outputs: str, loss: Loss) -> None:
    """What is kept of the teacher must do for the loss."""
    if loss.terms and outputs != "online":
        names = ", ".join(loss.terms)
        raise UserError(
            f"teacher.outputs is {outputs}, but loss.terms ({names}) needs the insides of the teacher: set teacher.outputs=online"
        )
    if outputs in SPARSE and loss.divergence not in (None, "forward_kl"):
        raise UserError(
            f"loss.divergence is {loss.divergence}, but teacher.outputs={outputs} keeps what forward_kl needs and no more: "
            "set teacher.outputs=hidden"
        )


def explain_error(error: OmegaConfBaseException) -> str:
    """What OmegaConf found wrong, in one line: the key, and the names that it could have been."""
    key, kind = str(error.full_key or error.key), error.object_type
    if kind is not None and "not in" in str(error):
        known = list(getattr(kind, "__dataclass_fields__", {}))
        return f"{key} is given, but there is no such key: {targets.did_you_mean(key.rpartition('.')[2], known)}"
    return f"{key}: {str(error).splitlines()[0]}: correct it in the recipe or on the command line"
