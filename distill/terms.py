"""Optional extra loss terms, which look inside both models: `loss.terms.<name>` in a recipe, with the class as `_target_`.

A term is attached once to both models, and then called after both have run on a batch. What it learns itself (projections)
belongs to the term, so it is trained and checkpointed beside the student but never becomes a part of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from distill import losses
from distill.errors import UserError
from distill.models.architectures import attention_projections, blocks, embedding_module
from distill.tasks.base import Batch

DISTANCES = {"mse": losses.hidden_mse, "cosine": losses.hidden_cosine}


class ForwardCapture:
    """A forward hook that keeps the last output of its module until it is taken."""

    output: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def pop_output(self) -> Tensor:
        output, self.output = self.output, None
        assert output is not None, "a term was called before both models had run on the batch"
        return output


class Term(nn.Module, ABC):
    """A value for each token, mean over the places where the two models are tapped; a subclass says where and how they compare."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not isinstance(weight, int | float) or not weight > 0:
            raise UserError(
                f"weight of {type(self).__name__} is {weight}, but it must be a number above 0: leave the term out to train without it"
            )
        self.weight = weight
        self._taps: dict[
            str, tuple[ForwardCapture, ForwardCapture]
        ] = {}  # place -> student's and teacher's
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Tap the places; UserError where a model does not have them. Attaching again starts over, but keeps what was learned."""

    @abstractmethod
    def compare(
        self, place: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """What was tapped at one place -> a value for each token, (B, L), 0 at padding."""

    def forward(self, batch: Batch) -> Tensor:
        """Mean over the tokens of the global batch, without the weight; computed in float32, also under autocast."""
        mask_BL = batch.inputs["attention_mask"]
        with torch.autocast(mask_BL.device.type, enabled=False):
            values = [
                self.compare(place, student.pop_output(), teacher.pop_output(), mask_BL)
                for place, (student, teacher) in self._taps.items()
            ]
            return losses.mean_over(torch.stack(values).mean(0), batch.tokens)

    def detach(self) -> None:
        """Leave the models as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taps.clear()

    def _tap(self, place: str, *modules: nn.Module) -> None:
        student, teacher = taps = ForwardCapture(), ForwardCapture()
        self._taps[place] = taps
        self._handles += [
            module.register_forward_hook(tap)
            for module, tap in zip(modules, (student, teacher), strict=True)
        ]


class HiddenStates(Term):
    """Distance between hidden states, mean over pairs of layers (TinyBERT, DistilBERT).

    `layers` maps student layers to teacher layers: i is the output of block i, -1 that of the embeddings. Where the widths differ, the
    student's states pass a learned projection.
    """

    def __init__(self, weight: float, layers: Mapping[int, int], distance: str = "mse") -> None:
        super().__init__(weight)
        if (
            not isinstance(layers, Mapping)
            or not layers
            or any(not isinstance(index, int) for pair in layers.items() for index in pair)
        ):
            raise UserError(
                f"layers of HiddenStates is {layers}, but it must map student layers to teacher layers: {{0: 1, 1: 3}}, say"
            )
        if distance not in DISTANCES:
            raise UserError(
                f"distance of HiddenStates is {distance}, but it must be one of {', '.join(DISTANCES)}: choose one of them"
            )
        self.layers = dict(layers)
        self.distance = DISTANCES[distance]
        self.projections = nn.ModuleDict()  # place -> Linear

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.detach()
        widths = student.config.hidden_size, teacher.config.hidden_size
        for mine, theirs in self.layers.items():
            place = f"{mine}_{theirs}"
            self._tap(place, _layer(student, mine, "student"), _layer(teacher, theirs, "teacher"))
            if widths[0] != widths[1] and place not in self.projections:
                self.projections[place] = nn.Linear(*widths, bias=False).to(student.device)

    def compare(
        self, place: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        if place in self.projections:
            student_BLD = self.projections[place](
                student_BLD.to(torch.promote_types(student_BLD.dtype, torch.float32))
            )
        return self.distance(student_BLD, teacher_BLD, mask_BL)


class AttentionRelations(Term):
    """KL between token-to-token relations of queries, keys and values, mean over the three (MiniLMv2, Wang et al. 2021).

    Both models' queries, keys and values are split into the same number of relation heads, so widths and attention heads may differ
    without anything to learn. They are taken as projected: before rotary positions, where a model has them.
    """

    def __init__(self, weight: float, student_layer: int, teacher_layer: int, heads: int) -> None:
        super().__init__(weight)
        for key, value, low in (
            ("student_layer", student_layer, 0),
            ("teacher_layer", teacher_layer, 0),
            ("heads", heads, 1),
        ):
            if not isinstance(value, int) or value < low:
                raise UserError(
                    f"{key} of AttentionRelations is {value}, but it must be a whole number from {low}: layers are counted from 0"
                )
        self.student_layer, self.teacher_layer, self.heads = student_layer, teacher_layer, heads

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.detach()
        mine = self._projections(_layer(student, self.student_layer, "student"), "student")
        theirs = self._projections(_layer(teacher, self.teacher_layer, "teacher"), "teacher")
        for place, *pair in zip(("query", "key", "value"), mine, theirs, strict=True):
            self._tap(place, *pair)

    def compare(
        self, place: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        student_BHLD, teacher_BHLD = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (student_BLD, teacher_BLD)
        )
        return losses.relation_kl(student_BHLD, teacher_BHLD, mask_BL)

    def _projections(self, block: nn.Module, what: str) -> tuple[nn.Module, ...]:
        found = attention_projections(block)
        for width in (int(projection.out_features) for projection in found):  # type: ignore[arg-type]
            if width % self.heads:
                raise UserError(
                    f"heads of AttentionRelations is {self.heads}, but it must divide the {what}'s width of {width}: 1 always does"
                )
        return found


def _layer(model: PreTrainedModel, index: int, what: str) -> nn.Module:
    found = blocks(model)
    if not -1 <= index < len(found):
        choices = f"take 0 to {len(found) - 1}, or -1 for its embeddings"
        raise UserError(
            f"a {what} layer of a loss term is {index}, but the {what} has {len(found)} layers: {choices}"
        )
    return embedding_module(model) if index == -1 else found[index]
