"""Loss terms on intermediate outputs of both models: `loss.terms.<name>` in a recipe.

A term registers forward hooks in both models, and is called after both have run on a batch. Its
parameters (projections) are trained and checkpointed with the student, but not exported with it.

B = examples, L = tokens of the longest, H = relation heads, D = width.
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
from distill.losses.products import at_least_float32
from distill.models.attention_parts import AttentionPart, attention_parts
from distill.models.block_probe import block_input
from distill.models.families import blocks, family_of
from distill.models.hidden_states import check_hidden_states
from distill.tasks.batch import Batch

DISTANCES = {"mse": losses.hidden_mse, "cosine": losses.hidden_cosine}


class ForwardCapture:
    """Hooks that store states of the last forward of a block.

    Args:
        block: A transformer block.
        part: One of :func:`attention_parts` of the block; None for the block itself.
        is_input: Whether to store the states that enter the block, not those that leave it.
        batch_first: Whether the model's states are (B, L, D), not (L, B, D).
    """

    def __init__(
        self,
        block: nn.Module,
        part: AttentionPart | None = None,
        is_input: bool = False,
        batch_first: bool = True,
    ) -> None:
        self.output: Tensor | None = None
        self._part, self._batch_first = part, batch_first
        self.handles = [block.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if part is not None:
            self.handles.append(part.layer.register_forward_hook(self._store))
        elif is_input:
            self.handles.append(
                block.register_forward_pre_hook(self._store_input, with_kwargs=True)
            )
        else:
            self.handles.append(block.register_forward_hook(self._store))

    def _enter(self, block: nn.Module, inputs: Any, named: Any) -> None:
        self.output = None

    def _store_input(self, block: nn.Module, inputs: Any, named: Any) -> None:
        self._set(block_input(inputs, named))

    def _store(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.output is None:  # DeBERTa's projections run again, on relative positions
            states = output[0] if isinstance(output, tuple) else output
            self._set(states if self._part is None else self._part.select(states))

    def _set(self, states: Tensor) -> None:
        self.output = states if self._batch_first else states.transpose(0, 1)

    def pop_output(self) -> Tensor:
        """Return the last output and drop the reference to it."""
        output, self.output = self.output, None
        assert output is not None, "a term was called before both models had run on the batch"
        return output


class Term(nn.Module, ABC):
    """A loss term: a value per token, averaged over pairs of modules.

    A subclass chooses the pairs in :meth:`attach` and compares their outputs in :meth:`compare`.

    Args:
        weight: Factor of the term in the loss, above 0.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not isinstance(weight, int | float) or not weight > 0:
            raise UserError(
                f"weight of {type(self).__name__} is {weight}, but it must be a number above 0: "
                "leave the term out to train without it"
            )
        self.weight = weight
        # Name of a pair -> captured outputs of student and teacher.
        self._captures: dict[str, tuple[ForwardCapture, ForwardCapture]] = {}
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Register the hooks, replacing earlier ones; parameters of the term are not changed.

        Raises:
            UserError: A model does not have the modules.
        """

    @abstractmethod
    def compare(
        self, pair: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """Compare the outputs of a pair of modules.

        Returns:
            A value for each token, (B, L), 0 at padding.
        """

    def forward(self, batch: Batch) -> Tensor:
        """The mean over the tokens of the global batch, without the weight.

        Computed in float32 also under autocast.
        """
        mask_BL = batch.pad(batch.inputs["attention_mask"])
        with torch.autocast(mask_BL.device.type, enabled=False):
            values = [
                self.compare(
                    pair, batch.pad(student.pop_output()), batch.pad(teacher.pop_output()), mask_BL
                )
                for pair, (student, teacher) in self._captures.items()
            ]
            return losses.mean_over(torch.stack(values).mean(0), batch.tokens)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captures.clear()

    def _capture(self, pair: str, student: ForwardCapture, teacher: ForwardCapture) -> None:
        """Keep a pair of captures."""
        self._captures[pair] = student, teacher
        self._handles += [*student.handles, *teacher.handles]


class HiddenStates(Term):
    """Distance between hidden states, mean over pairs of layers (TinyBERT, DistilBERT).

    If the widths of the models differ, the student's states pass through a learned projection.

    Args:
        weight: Factor of the term in the loss.
        layers: Student layer -> teacher layer: i is the output of block i, -1 of the embeddings.
        distance: `mse` or `cosine`.

    Example::

        terms:
          hidden: {_target_: distill.terms.HiddenStates, weight: 1.0, layers: {0: 1, 1: 3}}
    """

    def __init__(self, weight: float, layers: Mapping[int, int], distance: str = "mse") -> None:
        super().__init__(weight)
        if (
            not isinstance(layers, Mapping)
            or not layers
            or any(not isinstance(index, int) for pair in layers.items() for index in pair)
        ):
            raise UserError(
                f"layers of HiddenStates is {layers}, but it must map student layers to teacher "
                "layers: {0: 1, 1: 3}, for example"
            )
        if distance not in DISTANCES:
            raise UserError(
                f"distance of HiddenStates is {distance}, but it must be one of "
                f"{', '.join(DISTANCES)}: choose one of them"
            )
        self.layers = dict(layers)
        self.distance = DISTANCES[distance]
        self.projections = nn.ModuleDict()  # pair -> Linear

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.detach()
        for model in (student, teacher):
            check_hidden_states(model.config)
        widths = student.config.hidden_size, teacher.config.hidden_size
        for student_layer, teacher_layer in self.layers.items():
            pair = f"{student_layer}_{teacher_layer}"
            self._capture(
                pair,
                _states(student, student_layer, "student"),
                _states(teacher, teacher_layer, "teacher"),
            )
            if widths[0] != widths[1] and pair not in self.projections:
                self.projections[pair] = nn.Linear(*widths, bias=False).to(student.device)

    def compare(
        self, pair: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        if pair in self.projections:
            student_BLD = self.projections[pair](at_least_float32(student_BLD))
        return self.distance(student_BLD, teacher_BLD, mask_BL)


class AttentionRelations(Term):
    """KL between token-to-token relations of queries, keys and values (MiniLMv2, Wang et al. 2021).

    Mean over queries, keys and values, which are the outputs of the projections, before any rotary
    position embedding. Both models' are split into the same number of relation heads, so that
    widths and attention heads may differ without a projection.

    Args:
        weight: Factor of the term in the loss.
        student_layer: Block of the student, from 0.
        teacher_layer: Block of the teacher, from 0.
        heads: Relation heads; divides the widths of both models.

    Example::

        terms:
          relations:
            _target_: distill.terms.AttentionRelations
            weight: 1.0
            student_layer: 2
            teacher_layer: 5
            heads: 12
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
                    f"{key} of AttentionRelations is {value}, but it must be an integer of at "
                    f"least {low}: layers are counted from 0"
                )
        self.student_layer, self.teacher_layer, self.heads = student_layer, teacher_layer, heads

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.detach()
        pairs = zip(
            self._projections(student, self.student_layer, "student"),
            self._projections(teacher, self.teacher_layer, "teacher"),
            strict=True,
        )
        for name, pair in zip(("query", "key", "value"), pairs, strict=True):
            self._capture(name, *pair)

    def compare(
        self, pair: str, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        student_BHLD, teacher_BHLD = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (student_BLD, teacher_BLD)
        )
        return losses.relation_kl(student_BHLD, teacher_BHLD, mask_BL)

    def _projections(
        self, model: PreTrainedModel, index: int, role: str
    ) -> tuple[ForwardCapture, ...]:
        block = _block(model, index, role)
        parts = attention_parts(model, block)
        for part in parts:
            if part.width % self.heads:
                raise UserError(
                    f"heads of AttentionRelations is {self.heads}, but it must divide the {role}'s "
                    f"width of {part.width}: 1 always does"
                )
        first = family_of(model).batch_first
        return tuple(ForwardCapture(block, part, batch_first=first) for part in parts)


def _states(model: PreTrainedModel, index: int, role: str) -> ForwardCapture:
    """Captures the output of a block of the model, or at -1 that of its embeddings."""
    block = _block(model, max(index, 0), role) if index >= -1 else _block(model, index, role)
    return ForwardCapture(block, is_input=index == -1, batch_first=family_of(model).batch_first)


def _block(model: PreTrainedModel, index: int, role: str) -> nn.Module:
    layers, passes = blocks(model), family_of(model).passes
    if passes > 1:
        raise UserError(
            f"a loss term names layers of the {role}, but its {passes} layers are one block that "
            "runs again and again with the same weights: leave the term out, or use another model"
        )
    if not 0 <= index < len(layers):
        raise UserError(
            f"a {role} layer of a loss term is {index}, but the {role} has {len(layers)} layers: "
            f"choose 0 to {len(layers) - 1}, or -1 for its embeddings"
        )
    return layers[index]
