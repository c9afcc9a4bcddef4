"""Distillation from Python, of models and data that are in memory.

They are stored in the cache under a hash of their content, and the recipe names the stored files.
So the run is resumed, evaluated and exported like any other, and its recipe.yaml reproduces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import strftime
from typing import Any

from datasets import Dataset, DatasetDict
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import data, export, models, resume, store
from distill.errors import UserError
from distill.prepare import prepare
from distill.recipe import compose, config
from distill.recipe.explain import explain_error
from distill.tasks import build_task
from distill.train import train

__all__ = ["DistilledModel", "distill_model"]


@dataclass(frozen=True)
class DistilledModel:
    """The result of :func:`distill_model`.

    Args:
        student: the trained student, in eval mode on the CPU.
        tokenizer: its tokenizer.
        metrics: contents of metrics.json.
        folder: the run folder; its subfolder `export` is proven.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: Any
    folder: Path

    def export(self, format: str, **settings: Any) -> Path:
        """Export the student in another format, replacing `export` in the run folder.

        Args:
            format: dense, packed, torchao, onnx, openvino or executorch.
            settings: other keys of the recipe's section `export`.

        Returns:
            The folder of the export, proven to agree with the student.

        Raises:
            UserError: if the format does not support the settings.
            RunFailed: if the export does not agree, or is not smaller than the teacher.
        """
        options = export.Options(run=str(self.folder), format=format, **settings)
        return export.export_folder(self.folder, options)


def distill_model(
    student: PreTrainedModel | Mapping[str, Any],
    teacher: PreTrainedModel | Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase],
    dataset: DatasetDict | Dataset,
    folder: str | Path | None = None,
    **recipe: Any,
) -> DistilledModel:
    """Distill a teacher into a student on a dataset; measure and export the student.

    Args:
        student: a model, or the recipe's section: `{"layers": [0, 2]}` takes layers of the teacher.
        teacher: a model, the recipe's section, or None to train on the labels only.
        tokenizer: the tokenizer of both models, or `{"teacher": ..., "student": ...}`.
        dataset: its splits; missing validation and test splits are held out of `train`.
        folder: the run folder, `runs/<name>/<time>` by default. An interrupted run is resumed in
            its folder.
        recipe: the other keys of a recipe, a dictionary for each section.

    Returns:
        The trained student with its metrics.

    Raises:
        UserError: if models, data and recipe do not fit together.
        RunFailed: if the training diverges, or the export is not proven.

    Example::

        result = distill_model(
            {"layers": [0, 2, 4]}, teacher, tokenizer, dataset,
            task={"_target_": "distill.tasks.SingleLabelClassification"},
        )
        result.student.save_pretrained("small")
    """
    run = _compose(student, teacher, tokenizer, dataset, recipe)
    if run.trainer.devices > 1:
        raise UserError(
            f"trainer.devices is {run.trainer.devices}, but distill_model trains in this process: "
            "leave it out, or run the recipe with the command distill train"
        )
    folder = Path(folder or Path("runs") / run.name / strftime("%Y-%m-%d_%H-%M-%S"))
    folder.mkdir(parents=True, exist_ok=True)
    with resume.lock_run_folder(folder):
        metrics = train(run, folder)
    name = str(folder / "student")
    trained = models.load_tokenizer(name)
    tokenizers = models.Tokenizers(trained)
    bound = prepare(build_task(run.task), run.data, run.seed, tokenizers, (), name)
    result = models.load(name, None, bound.task, "student", trained, strict=True)
    return DistilledModel(result.eval(), trained, metrics, folder)


def _compose(
    student: Any, teacher: Any, tokenizer: Any, dataset: Any, recipe: dict[str, Any]
) -> config.Run:
    """Store the arguments, and compose the recipe that names their paths."""
    by_role = tokenizer if isinstance(tokenizer, Mapping) else {}
    roles = ("student",) if teacher is None else ("student", "teacher")
    tokenizers = {role: by_role.get(role, tokenizer) for role in roles}
    for each in tokenizers.values():
        _check_type("tokenizer", each, PreTrainedTokenizerBase)
    sections = {
        "student": _section("student", student, tokenizers["student"]),
        "teacher": None if teacher is None else _section("teacher", teacher, tokenizers["teacher"]),
        "tokenizer": {"model": _store_tokenizer(tokenizers["student"])},
    }
    for name, section in sections.items():
        if section is not None:
            recipe[name] = dict(recipe.get(name) or {}) | section
    recipe["data"] = dict(recipe.get("data") or {}) | {"source": _store_dataset(dataset)}
    try:
        composed = OmegaConf.merge(OmegaConf.structured(config.Run), {"name": "python"} | recipe)
        assert isinstance(composed, DictConfig)
        return compose.validate(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain_error(error)) from error


def _check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise UserError(
            f"{name} is a {type(value).__name__}, but it must be a {expected.__name__}: pass one"
        )


def _section(name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The recipe's section for a model, which is stored if it is in memory."""
    if isinstance(model, Mapping):
        return dict(model)
    _check_type(name, model, PreTrainedModel)
    content = {"model": models.fingerprint(model), "tokenizer": _content(tokenizer)}
    entry = store.entry_path("models", content | models.generation_identity(model))
    if not store.is_intact(entry):
        with store.write_entry(entry) as inside:
            models.save(model, tokenizer, inside)
    return {"model": str(entry)}


def _store_tokenizer(tokenizer: Any) -> str:
    entry = store.entry_path("tokenizers", {"tokenizer": _content(tokenizer)})
    if not store.is_intact(entry):
        with store.write_entry(entry) as inside:
            models.save_tokenizer(tokenizer, inside)
    return str(entry)


def _content(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of each file of a saved tokenizer."""
    with TemporaryDirectory() as folder:
        models.save_tokenizer(tokenizer, Path(folder))  # whatever its last call was
        return {file.name: store.sha256(file) for file in sorted(Path(folder).iterdir())}


def _store_dataset(dataset: Any) -> str:
    if isinstance(dataset, Dataset):
        dataset = DatasetDict(train=dataset)
    _check_type("dataset", dataset, DatasetDict)
    fingerprints = {name: data.fingerprint(split) for name, split in dataset.items()}
    entry = store.entry_path("datasets", fingerprints)
    if not store.is_intact(entry):
        with store.write_entry(entry) as inside:
            dataset.save_to_disk(inside / "data")
    return str(entry / "data")
