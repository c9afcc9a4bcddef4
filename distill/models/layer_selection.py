"""Build a student from a teacher's layers, with a report of every tensor of both models."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from distill import internals
from distill.errors import UserError
from distill.models.architectures import SHARED_KEYS, TRANSLATIONS, Translation
from distill.models.families import family_of, stacks
from distill.models.hub import silence_transformers
from distill.models.layer_proof import copy_blocks, layer_count, shorten_config
from distill.models.random_models import from_config
from distill.remote_code.modeling import CompressionConfig
from distill.tasks.base import Task

# Config keys that describe the teacher's weights and do not apply to the student.
NOT_INHERITED = {"compression", "auto_map"}
log = logging.getLogger("distill")
_NAME_ANOTHER = "set student.model or student.config in place of student.layers"


@dataclass
class TensorReport:
    """The source of each tensor of a student, and the tensors of the teacher that it lacks."""

    # Student's tensor -> the tensors of the teacher of which it is the sum.
    copied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    initialized: list[str] = field(default_factory=list)  # student's tensors without a source
    dropped: list[str] = field(default_factory=list)  # teacher's tensors that the student lacks

    def __str__(self) -> str:
        """Counts on the first line, then one line per tensor; equal tensors of blocks share one."""
        copied = [f"{name} <- {' + '.join(sources)}" for name, sources in self.copied.items()]
        parts = {"copied": copied, "initialized": self.initialized, "dropped": self.dropped}
        counts = ", ".join(f"{len(names)} {part}" for part, names in parts.items())
        lines = [f"  {part}: {line}" for part in parts for line in group_names(parts[part])]
        return "\n".join([f"tensors of the student: {counts}", *lines])


def select_layers(
    teacher: PreTrainedModel, layers: list[int], architecture: str | None, task: Task
) -> tuple[PreTrainedModel, TensorReport]:
    """Build a student from layers of a teacher.

    Tensors without a source in the teacher are initialized at random, from the global generator.
    With all layers and the teacher's architecture, the student's outputs are the teacher's.

    Args:
        teacher: An uncompressed model.
        layers: The teacher's layers to copy, from 0, in their order in the student.
        architecture: The student's `model_type`; None for the teacher's.
        task: Decides the head.

    Returns:
        The student, and where its tensors come from.

    Raises:
        UserError: The layers or the architecture do not fit the teacher.
    """
    _check_uncompressed(teacher)
    source = teacher.config.model_type
    target = architecture or source
    translation = _translation(source, target)
    _check_layers(layers, layer_count(teacher))
    if translation is None:
        _log_shared_layers(teacher, layers)
        config = shorten_config(teacher.config, layers)
        for key in NOT_INHERITED & vars(config).keys():
            delattr(config, key)
    else:
        config = _translate_config(teacher.config, layers, target, translation, task)
    with silence_transformers():
        attention = internals.attention_implementation(teacher.config)
        student = from_config(config, task, attention)
    return student, _copy_tensors(student, teacher, layers, translation)


def _check_uncompressed(teacher: PreTrainedModel) -> None:
    compression = CompressionConfig.from_config(teacher.config)
    special = {"shapes", "low_rank"} & compression.to_json().keys()
    if special:
        raise UserError(
            f"the teacher is a compressed model ({', '.join(sorted(special))} in its config), but "
            f"layers can be taken only from an uncompressed one: {_NAME_ANOTHER}"
        )


def _translation(source: str, target: str) -> Translation | None:
    if target == source:
        return None
    if (source, target) not in TRANSLATIONS:
        choices = [source, *(student for teacher, student in TRANSLATIONS if teacher == source)]
        raise UserError(
            f"student.architecture is {target}, but layers of a {source} teacher fit only into "
            f"{' or '.join(choices)}: choose one of these, or leave it out to keep the teacher's"
        )
    return TRANSLATIONS[source, target]


def _check_layers(layers: list[int], count: int) -> None:
    choices = f"name layers of the teacher, 0 to {count - 1}"
    if not layers:
        raise UserError(f"student.layers is {layers}, but a student needs at least one: {choices}")
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(
                f"student.layers has {layer}, but the teacher has {count} layers: {choices}"
            )
    if len(set(layers)) < len(layers):
        raise UserError(
            f"student.layers is {layers}, but each layer can be taken only once: "
            "leave out the repeated ones"
        )


def _require(config: PreTrainedConfig, required: Any, target: str) -> None:
    for key, value in required.items():
        if getattr(config, key) != value:
            raise UserError(
                f"the teacher's {key} is {getattr(config, key)}, but a {target} student of its "
                f"layers needs {value}: {_NAME_ANOTHER}"
            )


def _log_shared_layers(teacher: PreTrainedModel, layers: list[int]) -> None:
    passes = family_of(teacher).passes
    if passes > 1:
        log.info(
            "the teacher's %d layers share their weights: a student of %d of them needs less time, "
            "but has as many parameters",
            *(passes, len(layers)),
        )


def _translate_config(
    config: PreTrainedConfig, layers: list[int], target: str, translation: Translation, task: Task
) -> PreTrainedConfig:
    _require(config, translation.requires, target)
    values = {key: getattr(config, key) for key in SHARED_KEYS}
    values |= {new: getattr(config, old) for new, old in translation.config.items()}
    return AutoConfig.for_model(
        target, num_hidden_layers=len(layers), **values, **task.model_kwargs()
    )


@torch.no_grad()
def _copy_tensors(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: list[int],
    translation: Translation | None,
) -> TensorReport:
    """Copy the teacher's tensors whose (translated) name and shape the student has."""
    report = TensorReport()
    if translation is None:
        report.copied = {
            target: (name,) for target, name in copy_blocks(student, teacher, layers).items()
        }
    else:
        report.copied = _translate_tensors(student, teacher, layers, translation)
    used = {source for added in report.copied.values() for source in added}
    report.initialized = [name for name in student.state_dict() if name not in report.copied]
    report.dropped = [name for name in teacher.state_dict() if name not in used]
    return report


def _translate_tensors(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: list[int],
    translation: Translation,
) -> dict[str, tuple[str, ...]]:
    copied, targets, sources = {}, student.state_dict(), teacher.state_dict()
    for name, tensor in sources.items():
        target = _target_name(name, teacher, student, layers, translation)
        if target in targets and targets[target].shape == tensor.shape:
            folded = translation.folded.items()
            added = (name, *(extra for extra, table in folded if table == name))
            targets[target].copy_(_add_first_rows(added, sources))
            copied[target] = added
    return copied


def _add_first_rows(names: tuple[str, ...], tensors: dict[str, Tensor]) -> Tensor:
    """The first tensor, plus row 0 of each of the others."""
    total = tensors[names[0]]
    for extra in names[1:]:
        total = total.float() + tensors[extra][0].float()
    return total


def _target_name(
    name: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layers: list[int],
    translation: Translation,
) -> str | None:
    """The student's name of a tensor of the teacher; None if the student does not have it."""
    old, new = (
        f"{model.base_model_prefix}.{next(iter(stacks(model)))}." for model in (teacher, student)
    )
    if not name.startswith(old):
        return _replace_prefix(name, translation.outer)
    number, _, rest = name.removeprefix(old).partition(".")
    if int(number) not in layers:
        return None
    inner = _replace_prefix(rest, translation.block)
    return inner and f"{new}{layers.index(int(number))}.{inner}"


def _replace_prefix(name: str, prefixes: Any) -> str | None:
    renamed = (
        new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)
    )
    return next(renamed, None)


def group_names(names: Iterable[str]) -> list[str]:
    """One line for names that differ only in the number of a block: `layer.{0,1}.attention`."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+\.", ".{}.", name), []).append(
            re.findall(r"\.(\d+)\.", name)
        )
    return [
        line.format(*(f"{{{','.join(numbers)}}}" for numbers in zip(*members, strict=True)))
        for line, members in groups.items()
    ]
