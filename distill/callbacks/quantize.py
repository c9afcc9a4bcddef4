"""Quantization while training: the student answers with quantized weights, its latent ones go on learning."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.callbacks.base import Compression, compression_config, expand_low_rank, select_modules
from distill.compress import fake_quant
from distill.compress.observe import Observer
from distill.compress.quantizer import (
    GROUP_SIZE,
    MIN_EMBEDDING_ROWS,
    QuantSpec,
    default_group_size,
    largest_divisor,
)
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import LINEAR, LowRank, in_out_features

WHOLE = (*LINEAR, LowRank)
ACTIVATIONS = (None, "dynamic", "static")
MOMENTUM = 0.05  # of a new batch in the moving range of a layer's inputs


class Quantize(Compression):
    """Gives weights 2^bits values each: a "linear" grid, the 16 levels of "nf4", or a "codebook" of k-means that follows the weights.

    From `start` on, the forward uses the quantized weights, and their gradient goes straight to the latent ones. At 1.0 this is
    quantization after training. `symmetric`: is the linear grid centred on 0? `group`: inputs of a row that share a grid; 0 the
    whole row, -1 the whole tensor. Null is what suits the bits: 8 bits are symmetric with a grid for each row, fewer are not and
    have one for each 64 inputs, or as many as divide the row, or the row; a codebook serves the whole tensor.

    `activations` rounds the inputs of the linear layers to 8 bits as well: over the range of each token ("dynamic"), or over a
    moving average of what the training batches spanned ("static"). Every `every` steps codebooks and ranges are brought up to date.

    Null for `layers`: the linear layers of the blocks, those outside that do not narrow (a pooler, but no classifier), and with
    `embeddings` the tables of 16 rows or more. A pattern may name layers of any of these kinds.
    """

    stage = "quantization"

    def __init__(
        self,
        bits: int = 8,
        method: str = "linear",
        symmetric: bool | None = None,
        group: int | None = None,
        activations: str | None = None,
        embeddings: bool = True,
        layers: list[str] | None = None,
        start: float = 0.3,
        every: int = 20,
    ) -> None:
        super().__init__(start, start, "one_shot", every)
        if activations not in ACTIVATIONS:
            raise self.error(
                f"activations is {activations}, but it must be null, dynamic or static: choose one of them"
            )
        if symmetric is not None and method != "linear":
            raise self.error(
                f"symmetric is {symmetric}, but only linear grids can be so, and method is {method}: leave symmetric out"
            )
        if isinstance(layers, str):
            raise self.error(f"layers is {layers}, but it must be a list of patterns: [{layers}]")
        self.bits, self.method, self.group = bits, method, group
        self.symmetric = method == "linear" and (bits == 8 if symmetric is None else symmetric)
        self.activations, self.embeddings, self.layers = activations, embeddings, layers
        self.ranges: dict[str, Tensor] = {}  # name of the layer -> (2,), lowest and highest input
        self._observer: Observer | None = None
        self._observed: dict[str, nn.Module] = {}
        with self.prefix_errors():
            self.spec(GROUP_SIZE)

    def spec(self, width: int) -> QuantSpec:
        """How a tensor with that many inputs is quantized."""
        if self.group is not None:
            group = (
                largest_divisor(width, self.group) if self.group > 0 else self.group
            )  # another technique may have changed the width
        elif self.method == "linear":
            group = default_group_size(self.bits, width)
        else:
            group = -1 if self.method == "codebook" else largest_divisor(width, GROUP_SIZE)
        return QuantSpec(self.method, self.bits, self.symmetric, group)

    def prepare(self, module: Distillation) -> None:
        """Refuse, before the first step, layers that are not there, groups that do not fit and tensors quantized twice."""
        student, tensors = module.student, self.tensors(module.student)
        if self.activations is not None and not self.rounded(student):
            raise self.error(
                f"activations is {self.activations}, but layers has embeddings only, whose inputs are numbers of tokens: leave it out"
            )
        if self._seen == 0 and self.group is not None:  # a resumed student may have other widths
            with self.prefix_errors():
                for name, layer in tensors.items():
                    QuantSpec(self.method, self.bits, self.symmetric, self.group).check(
                        name, inputs(layer)
                    )
        for other in self.other_techniques(module.trainer):
            if isinstance(other, Quantize) and (
                twice := sorted(other.tensors(student).keys() & tensors)
            ):
                way_out = "name layers for each, or set embeddings to false in one"
                raise self.error(
                    f"layers has {twice[0]}, but another Quantize has it too, and a weight has one grid: {way_out}"
                )
        self._observe(student)
        self._mark_sparse(student)

    def change(self, module: Distillation, amount: float) -> None:
        student = module.student
        self._observe(student)  # layers that others have replaced until now
        weights = {
            name: self.spec(inputs(layer)).as_dict()
            for name, layer in self.tensors(student).items()
        }
        unknown = None if self.activations == "dynamic" else [0.0, 0.0]
        activations = {name: {"bits": 8, "range": unknown} for name in self.rounded(student)}
        for key, described in (("weights", weights), ("activations", activations)):
            if described:
                compression_config(student).setdefault(key, {}).update(described)
        fake_quant.attach_fake_quant(student, weights, activations)
        self._mark_sparse(student)
        fake_quant.fit_codebooks(student, weights)
        fake_quant.set_ranges(student, self.ranges)

    def after_step(self, module: Distillation) -> None:
        self._share_ranges()
        if self.reached < 1:
            self._observe(module.student)
            return
        self._mark_sparse(module.student)
        since = self._seen - self.schedule.first(module.trainer.max_steps)
        if since % self.every == 0:
            fake_quant.fit_codebooks(module.student, self.tensors(module.student), refine=True)
        if since % self.every == 0 or since == 1:  # ranges may have been unknown at the start
            fake_quant.set_ranges(module.student, self.ranges)

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        fake_quant.fold_fake_quant(student)
        return tokenizer

    def tensors(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The tensors to quantize, by name, each with its layer."""
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        return {names[id(layer.weight)]: layer for layer in self._layers(student).values()}

    def rounded(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers whose inputs are rounded: linear ones, but for an output layer that shares its weight with the embeddings."""
        table = student.get_input_embeddings().weight
        found = self._layers(student) if self.activations is not None else {}
        return {
            name: layer
            for name, layer in found.items()
            if isinstance(layer, LINEAR) and layer.weight is not table
        }

    def _layers(self, student: PreTrainedModel) -> dict[str, Any]:
        """The layers to act on, as the student is now: a factorized one stands for its two factors."""
        with self.prefix_errors():
            found = (
                self._default(student)
                if self.layers is None
                else select_modules(student, self.layers, (*WHOLE, nn.Embedding))
            )
        return expand_low_rank(found, (*LINEAR, nn.Embedding))

    def _default(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        table = student.get_input_embeddings().weight
        found = select_modules(student, None, WHOLE)
        for name, layer in student.named_modules():
            tied = layer._parameters.get("weight") is table  # then the table itself stands for both
            if (
                isinstance(layer, nn.Embedding)
                and self.embeddings
                and layer.num_embeddings >= MIN_EMBEDDING_ROWS
            ):
                found[name] = layer
            if (
                isinstance(layer, nn.Linear | LowRank)
                and layer.out_features >= layer.in_features
                and not tied
            ):
                found[name] = layer
        return found

    # ---- ranges of the inputs, and zeros

    def _observe(self, student: PreTrainedModel) -> None:
        """Look at the inputs of the layers as they are now; what was seen of layers that are still there is kept."""
        watched = self.rounded(student) if self.activations == "static" else {}
        if list(watched.items()) == list(self._observed.items()):
            return
        if self._observer is not None:
            self._observer.remove()
            gone = [
                name for name in self.ranges if watched.get(name) is not self._observed.get(name)
            ]
            self.ranges = {
                name: value for name, value in self._observer.values.items() if name not in gone
            }
        self._observer, self._observed = Observer(student, watched, extremes, moving), watched
        self._observer.values = self.ranges = {
            name: value.to(student.device) for name, value in self.ranges.items()
        }

    def _share_ranges(self) -> None:
        """Their mean over the ranks that have seen an example, after each step: a checkpoint holds those of one rank."""
        if ranks.world_size() > 1:
            seen = ranks.all_reduce_sum_by_name(
                {
                    name: torch.cat([value, torch.ones_like(value[:1])])
                    for name, value in self.ranges.items()
                }
            )
            self.ranges.update({name: total_3[:2] / total_3[2] for name, total_3 in seen.items()})

    def _mark_sparse(self, student: PreTrainedModel) -> None:
        fake_quant.mark_sparse(student, compression_config(student).get("sparse", ()))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ranges": dict(self.ranges)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranges = dict(state["ranges"])


def inputs(layer: nn.Module) -> int:
    """Along which groups run: the input width of a linear layer, the width of an embedding's row."""
    return layer.embedding_dim if isinstance(layer, nn.Embedding) else in_out_features(layer)[0]


def extremes(input_ND: Tensor) -> Tensor:
    """(lowest, highest)."""
    return torch.stack([input_ND.amin(), input_ND.amax()])


def moving(old_2: Tensor, new_2: Tensor) -> Tensor:
    return old_2 + MOMENTUM * (new_2 - old_2)
