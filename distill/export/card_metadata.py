"""The metadata at the top of a model card, as the Hugging Face Hub reads them."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from distill import models
from distill.data.sources import FUNCTION
from distill.errors import UserError
from distill.recipe import capabilities, config
from distill.tasks.base import Task

METRIC_TYPES = {"mcc": "matthews_correlation", "macro_f1": "f1", "micro_f1": "f1"}  # of the Hub
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """A model that a student was made from.

    Args:
        name: its name in the recipe.
        data: the metadata of its own card; empty without one.
    """

    name: str
    data: Mapping[str, Any]

    @property
    def base_models(self) -> list[str]:
        """Its name on the Hub; for a folder, those that its card names."""
        if is_hub_name(self.name):
            return [self.name]
        named = self.data.get("base_model") or []
        return [named] if isinstance(named, str) else [*named]

    @property
    def license(self) -> dict[str, Any]:
        return {key: self.data[key] for key in _LICENSE if self.data.get(key)}


class Origins(NamedTuple):
    """The models that a student was made from, and whether it has a teacher."""

    models: list[Origin]
    distilled: bool


def origins(student: config.Student, teacher: config.Teacher | None) -> Origins:
    """The named models of a recipe: the one with the student's first weights, then its teacher."""
    names = [student.model, teacher.model if teacher is not None else None]
    named = [Origin(name, read_card(name)) for name in dict.fromkeys(names) if name is not None]
    return Origins(named, teacher is not None)


def read_card(name: str) -> dict[str, Any]:
    """The metadata of a model's card; empty if there is none, or it cannot be fetched."""
    try:
        where = models.resolve_path(name, "model")
        if os.path.isdir(where):
            where = os.path.join(where, "README.md")
            if not os.path.isfile(where):
                return {}
        data: dict[str, Any] = ModelCard.load(where, ignore_metadata_errors=True).data.to_dict()
        return data
    except (OSError, ValueError, YAMLError, UserError):  # those of the Hub are subclasses
        return {}


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, not of a folder, file or function."""
    return _HUB_NAME.fullmatch(name) is not None and not os.path.exists(os.path.expanduser(name))


def metadata(
    name: str,
    data: config.Data,
    task: Task,
    format: str | None,
    quality: Mapping[str, float],
    made_from: Origins,
) -> str:
    """The YAML block of a card.

    Args:
        name: the name of the run.
        data: the recipe's section `data`.
        task: bound to the labels of the data.
        format: `export.format`.
        quality: metrics of this export on the test split; empty if it was not measured.
        made_from: result of :func:`origins`.
    """
    named, source = made_from.models, data.source
    bases = dict.fromkeys(base for origin in named for base in origin.base_models)
    license = next((origin.license for origin in named if origin.license), {})
    language = next((origin.data["language"] for origin in named if _language(origin)), None)
    on_hub = is_hub_name(source) and not FUNCTION.fullmatch(source)
    content = ModelCardData(
        **license,
        language=language,
        base_model=[*bases] or None,
        datasets=[source] if on_hub else None,
        library_name=format if format in capabilities.RUNTIMES else "transformers",
        pipeline_tag=task.pipeline,
        tags=["distillation" if made_from.distilled else "fine-tuned"],
        model_name=name if quality else None,
        eval_results=_results(task, data, quality) if quality else None,
    )
    return f"---\n{content.to_yaml().strip()}\n---"


def _language(origin: Origin) -> Any:
    return origin.data.get("language")


def _results(task: Task, data: config.Data, quality: Mapping[str, float]) -> list[EvalResult]:
    """Entries of a model index, without values that are not finite numbers."""
    source = data.source if is_hub_name(data.source) else os.path.basename(data.source)
    return [
        EvalResult(
            task_type=task.pipeline,
            dataset_type=source,
            dataset_name=source,
            dataset_config=data.config,
            dataset_split=data.test or data.train,
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in quality.items()
        if value is not None and math.isfinite(value)
    ]
