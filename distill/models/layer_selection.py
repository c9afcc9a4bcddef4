"""A teacher's own layers -> a student, with every tensor of both models accounted for."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.architectures import SHARED_KEYS, TRANSLATIONS, Translation, architecture
from distill.models.loading import from_config, silence_transformers
from distill.remote_code.modeling import compression_of
from distill.tasks.base import Task

INHERITED = {
    "compression",
    "auto_map",
}  # what a compressed teacher's config says of its own weights


@dataclass
class TensorReport:
    """Where each tensor of a cut student comes from, and what became of each of its teacher's."""

    copied: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # student's tensor -> teacher's, of which it is the sum
    initialised: list[str] = field(
        default_factory=list
    )  # student's tensors that no tensor of the teacher fits
    dropped: list[str] = field(
        default_factory=list
    )  # teacher's tensors that the student has no place for

    def __str__(self) -> str:
        """The whole account for the log, the blocks' numbers gathered: `encoder.layer.{0,2}.output.dense.weight`."""
        copied = [f"{name} <- {' + '.join(sources)}" for name, sources in self.copied.items()]
        parts = {"copied": copied, "initialised": self.initialised, "dropped": self.dropped}
        counts = ", ".join(f"{len(names)} {part}" for part, names in parts.items())
        return "\n".join(
            [
                f"tensors of the student: {counts}",
                *(f"  {part}: {line}" for part in parts for line in group_names(parts[part])),
            ]
        )


def select_layers(
    teacher: PreTrainedModel, layers: list[int], architecture: str | None, task: Task
) -> tuple[PreTrainedModel, TensorReport]:
    """A student made of these layers of the teacher, in this order; what no tensor of the teacher fits is drawn at random.

    With all layers and the teacher's own architecture (null) the student answers exactly as its teacher.
    """
    _check_ordinary(teacher)
    own = teacher.config.model_type
    target = architecture or own
    translation = _translation(own, target)
    _check_layers(layers, teacher.config.num_hidden_layers)
    config = (
        _kept(teacher.config, layers)
        if translation is None
        else _translated(teacher.config, layers, target, translation, task)
    )
    with silence_transformers():
        student = from_config(config, task, teacher.config._attn_implementation)
    return student, _fill(student, teacher, layers, translation)


def _check_ordinary(teacher: PreTrainedModel) -> None:
    special = {"shapes", "low_rank"} & compression_of(teacher.config).keys()
    if special:
        raise UserError(
            f"the teacher is a compressed model ({', '.join(sorted(special))} in its config), but layers can be cut only from an ordinary "
            "one: give student.model or student.config in place of student.layers"
        )


def _translation(own: str, target: str) -> Translation | None:
    if target == own:
        architecture(own)
        return None
    if (own, target) not in TRANSLATIONS:
        fits = [own, *(student for teacher, student in TRANSLATIONS if teacher == own)]
        raise UserError(
            f"student.architecture is {target}, but layers of a {own} teacher fit only into {' or '.join(fits)}: "
            "choose one of these, or leave it out to keep the teacher's"
        )
    return TRANSLATIONS[own, target]


def _check_layers(layers: list[int], count: int) -> None:
    if not layers:
        raise UserError(
            f"student.layers is {layers}, but a student needs at least one: name layers of the teacher, 0 to {count - 1}"
        )
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(
                f"student.layers has {layer}, but the teacher has {count} layers: name layers from 0 to {count - 1}"
            )
    if len(set(layers)) < len(layers):
        raise UserError(
            f"student.layers is {layers}, but each layer can be taken only once: leave out the repeated ones"
        )


def _require(config: PreTrainedConfig, required: Any, target: str) -> None:
    for key, value in required.items():
        if getattr(config, key) != value:
            raise UserError(
                f"the teacher's {key} is {getattr(config, key)}, but a {target} student cut from its layers needs {value}: "
                "give student.model or student.config in place of student.layers"
            )


def _kept(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """The teacher's config with fewer layers; settings listed layer by layer follow them."""
    if layers != list(range(config.num_hidden_layers)):
        _require(config, architecture(config.model_type).requires, config.model_type)
    kept = copy.deepcopy(config)
    kept.num_hidden_layers = len(layers)
    for key in INHERITED & vars(kept).keys():
        delattr(kept, key)
    if kept.to_dict().get("layer_types") is not None:
        kept.layer_types = [config.layer_types[layer] for layer in layers]
    return kept


def _translated(
    config: PreTrainedConfig, layers: list[int], target: str, translation: Translation, task: Task
) -> PreTrainedConfig:
    _require(config, translation.requires, target)
    values = {key: getattr(config, key) for key in SHARED_KEYS}
    values |= {ours: getattr(config, theirs) for ours, theirs in translation.config.items()}
    return AutoConfig.for_model(
        target, num_hidden_layers=len(layers), **values, **task.model_options()
    )


@torch.no_grad()
def _fill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: list[int],
    translation: Translation | None,
) -> TensorReport:
    """Copy what fits from teacher to student."""
    account, ours, theirs = TensorReport(), student.state_dict(), teacher.state_dict()
    folded = translation.folded if translation else {}
    for name, tensor in theirs.items():
        own = _name(name, teacher, student, layers, translation)
        if own in ours and ours[own].shape == tensor.shape:
            sources = (name, *(extra for extra, table in folded.items() if table == name))
            ours[own].copy_(_summed(sources, theirs))
            account.copied[own] = sources
    used = {source for sources in account.copied.values() for source in sources}
    account.initialised = [name for name in ours if name not in account.copied]
    account.dropped = [name for name in theirs if name not in used]
    return account


def _summed(sources: tuple[str, ...], tensors: dict[str, Tensor]) -> Tensor:
    """The first tensor, plus row 0 of each table folded into it."""
    total = tensors[sources[0]]
    for extra in sources[1:]:
        total = total.float() + tensors[extra][0].float()
    return total


def _name(
    name: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layers: list[int],
    translation: Translation | None,
) -> str | None:
    """What a tensor of the teacher is called in the student; null where it has no place."""
    theirs, ours = (
        f"{m.base_model_prefix}.{architecture(m.config.model_type).blocks}."
        for m in (teacher, student)
    )
    if not name.startswith(theirs):
        return name if translation is None else _renamed(name, translation.outer)
    number, _, rest = name.removeprefix(theirs).partition(".")
    if int(number) not in layers:
        return None
    renamed = rest if translation is None else _renamed(rest, translation.block)
    return renamed and f"{ours}{layers.index(int(number))}.{renamed}"


def _renamed(name: str, prefixes: Any) -> str | None:
    return next(
        (
            ours + name.removeprefix(theirs)
            for theirs, ours in prefixes.items()
            if name.startswith(theirs)
        ),
        None,
    )


def group_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in a block's number, as one line: `layer.{0,1}.attention`."""
    lines: dict[str, list[list[str]]] = {}
    for name in names:
        lines.setdefault(re.sub(r"\.\d+\.", ".{}.", name), []).append(
            re.findall(r"\.(\d+)\.", name)
        )
    return [
        line.format(*(f"{{{','.join(numbers)}}}" for numbers in zip(*found, strict=True)))
        for line, found in lines.items()
    ]
