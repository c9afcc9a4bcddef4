"""Recipe files -> validated :class:`Run` objects, and back.

A recipe is named (`recipe=bert_to_distil`) or given as a file (`recipe=mine.yaml`). Names are those
of the shipped recipes and of the folder `recipes` in the current directory, which takes precedence.
"""

import copy
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import DictConfig, OmegaConf

from distill import store
from distill.errors import UserError
from distill.recipe import capabilities, targets, yaml_files
from distill.recipe.config import SPARSE, Loss, Optimizer, Run, Student, Teacher, Trainer
from distill.recipe.memory_keys import check_memory_keys
from distill.recipe.references import check_references, hide_in_values
from distill.recipe.schema import check_kinds
from distill.recipe.validation import check_fused

__all__ = [
    "SHIPPED",
    "available_recipes",
    "load_recipe",
    "read_recipe",
    "save_recipe",
    "validate",
    "with_absolute_paths",
]

PACKAGE = Path(__file__).parents[1]
_FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # installed, in the repository
SHIPPED = next(folder for folder in _FOLDERS if folder.is_dir())


def available_recipes() -> dict[str, Path]:
    """The recipes that a name selects: name -> file."""
    folders = [folder for folder in (SHIPPED, Path.cwd() / "recipes") if folder.is_dir()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def read_recipe(file: Path) -> DictConfig:
    """Parse a recipe file, without the defaults of the keys that it leaves out.

    Raises:
        UserError: if it is not a YAML file of keys.
    """
    recipe = yaml_files.load_mapping(file)
    if "hydra" in recipe:
        raise UserError(
            f"recipe {file} has the key hydra, but a recipe cannot change Hydra's settings, which "
            "run code: remove it, and set hydra.run.dir on the command line"
        )
    plain = OmegaConf.to_container(recipe)
    check_references(plain)
    check_kinds(plain)  # type: ignore[arg-type]
    return OmegaConf.merge({"name": file.stem}, recipe)  # type: ignore[return-value]


def load_recipe(name: str) -> Run:
    """Load and validate a recipe by its name, or by the path of its file.

    Raises:
        UserError: if there is no such recipe, or a value in it is refused.

    Example:
        >>> load_recipe("tiny").loss.alpha
        0.5
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else available_recipes().get(name)
    if file is None or not file.is_file():
        suggestion = targets.did_you_mean(name, list(available_recipes()))
        raise UserError(f"recipe is {name}, but there is no such recipe: {suggestion}")
    recipe = read_recipe(file)
    if bases := recipe.pop("defaults", None):
        raise UserError(
            f"recipe {name} builds on {list(bases)}, but only distill.train composes recipes: "
            "give the recipe.yaml of its run folder"
        )
    composed = OmegaConf.merge(OmegaConf.structured(Run), recipe)
    assert isinstance(composed, DictConfig)
    return validate(composed)


def validate(composed: DictConfig) -> Run:
    """Convert a composed recipe to dataclasses and check every key and `_target_` in it.

    Raises:
        UserError: if a value is refused, alone or together with others.
        OmegaConfBaseException: if there is no such key, see `explain.py`.
    """
    if missing := OmegaConf.missing_keys(composed):
        raise UserError(
            f"{', '.join(sorted(missing))} is not given, but recipe {composed.name} needs it: "
            "set it in the recipe"
        )
    plain = OmegaConf.to_container(composed)
    check_references(plain)  # also those of the command line
    # Merging again refuses keys added with +.
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), plain))
    assert isinstance(run, Run)
    # callbacks.x=null on the command line removes a callback of the recipe
    run.callbacks = {name: spec for name, spec in run.callbacks.items() if spec is not None}
    targets.check_target("task", run.task)
    for section, specs in (("loss.terms", run.loss.terms), ("callbacks", run.callbacks)):
        for name, spec in specs.items():
            targets.check_target(f"{section}.{name}", spec)
    _check_loss(run.loss, run.teacher, run.student)
    _check_trainer(run.trainer, run.optimizer, run.data.batch_size)
    check_memory_keys(run)
    export = run.export
    capabilities.check_export(export.format, export.dtype, export.quantize, export.bits)
    return run


def with_absolute_paths(run: Run) -> Run:
    """A copy of the run in which paths of local files and folders are absolute."""
    saved = copy.deepcopy(run)
    models = [section for section in (saved.tokenizer, saved.teacher, saved.student) if section]
    for section, key in ((saved.data, "source"), *((model, "model") for model in models)):
        value = getattr(section, key)
        if value is not None and Path(value).exists():
            setattr(section, key, str(Path(value).absolute()))
    # Not a folder, which may only have the name of a split.
    if _is_file(saved.data.unlabelled):
        saved.data.unlabelled = str(Path(saved.data.unlabelled).absolute())
    if _is_file(saved.task.get("template")):
        saved.task["template"] = str(Path(saved.task["template"]).absolute())
    tasks = saved.evaluate.harness_path
    if tasks is not None and Path(tasks).is_dir():
        saved.evaluate.harness_path = str(Path(tasks).absolute())
    return saved


def _is_file(value: Any) -> TypeGuard[str]:
    """Whether a value of a recipe names a file."""
    with suppress(OSError):  # of a text that is too long for a name
        return isinstance(value, str) and Path(value).is_file()
    return False


def save_recipe(run: Run, file: Path) -> None:
    """Write the run as a recipe that reproduces it from any directory."""
    plain = hide_in_values(asdict(with_absolute_paths(run)))
    text = OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(Run), plain))
    store.write_file(file, f"# python -m distill.train recipe={file.absolute()}\n{text}".encode())


def _check_loss(loss: Loss, teacher: Teacher | None, student: Student) -> None:
    """Check the keys that need a teacher."""
    if loss.divergence is not None:
        path = loss.divergence
        try:
            targets.read_signature(path if "." in path else f"distill.losses.{path}")
        except UserError as error:
            raise UserError(f"loss.divergence is {path}: {error}") from error
    if teacher is not None:
        _check_outputs(teacher.outputs, loss)
        if teacher.outputs == "served":
            _check_served(loss, student)
        return
    if student.layers is not None:
        raise UserError(
            f"student.layers is {student.layers}, but there is no teacher: set teacher.model"
        )
    if loss.alpha < 1:
        raise UserError(
            f"loss.alpha is {loss.alpha:g}, but there is no teacher: "
            "set teacher.model, or loss.alpha=1"
        )
    if loss.terms:
        raise UserError(
            f"loss.terms is {', '.join(loss.terms)}, but there is no teacher: set teacher.model"
        )


def _check_outputs(outputs: str, loss: Loss) -> None:
    """Check that the cached teacher outputs suffice for the loss."""
    if loss.terms and outputs != "online":
        raise UserError(
            f"teacher.outputs is {outputs}, but loss.terms ({', '.join(loss.terms)}) needs hidden "
            "states or attention of the teacher: set teacher.outputs=online"
        )
    if loss.compares_spans and (outputs != "online" or loss.on_policy):
        key, value = "teacher.outputs", str(outputs)
        if loss.on_policy:
            key, value = "loss.on_policy", f"{loss.on_policy:g}"
        raise UserError(
            f"loss.divergence is {loss.divergence}, which compares models of different tokenizers, "
            f"but {key} is {value}: set teacher.outputs=online and loss.on_policy=0"
        )
    if outputs in SPARSE and loss.divergence not in (None, "forward_kl"):
        raise UserError(
            f"loss.divergence is {loss.divergence}, but teacher.outputs={outputs} supports "
            "forward_kl only: set teacher.outputs=hidden"
        )


def _check_served(loss: Loss, student: Student) -> None:
    """Check what a served teacher, whose weights are not here, cannot do."""
    if student.layers is not None:
        raise UserError(
            f"student.layers is {student.layers}, but teacher.outputs=served loads no weights to "
            "take layers from: set student.model"
        )
    if loss.temperature != 1 and loss.alpha < 1:
        raise UserError(
            f"loss.temperature is {loss.temperature:g}, but a server gives probabilities at 1, and "
            "those of the tokens that it leaves out are unknown at another: set loss.temperature=1"
        )
    if loss.divergence not in (None, "forward_kl"):
        raise UserError(
            f"loss.divergence is {loss.divergence}, but teacher.outputs=served supports forward_kl "
            "only: leave loss.divergence out"
        )


def _check_trainer(trainer: Trainer, optimizer: Optimizer, batch_size: int) -> None:
    """Check the keys of the trainer and the optimizer against each other."""
    if trainer.accumulate > batch_size:
        raise UserError(
            f"trainer.accumulate is {trainer.accumulate}, but data.batch_size is {batch_size}, and "
            "every micro-batch needs an example: lower trainer.accumulate"
        )
    if trainer.strategy == "fsdp" and trainer.compile:
        raise UserError(
            "trainer.compile is true, but trainer.strategy=fsdp gathers the weights of each block "
            "when it is used: leave trainer.compile out"
        )
    if trainer.strategy == "fsdp" and optimizer.bits == 8:
        raise UserError(
            "optimizer.bits is 8, but trainer.strategy=fsdp divides the moments among the ranks: "
            "leave optimizer.bits out"
        )
    check_fused(optimizer.fused, trainer.precision)
    if trainer.strategy == "fsdp" and trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision is 16-mixed, but trainer.strategy=fsdp has no fp16 gradient scaler: "
            "set trainer.precision=bf16-mixed"
        )
