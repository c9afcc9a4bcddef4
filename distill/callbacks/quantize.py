"""Quantization-aware training: the student computes with quantized weights while it trains."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.callbacks.compression import Compression
from distill.compress import fake_quant
from distill.compress.groups import PER_TENSOR, parse_group
from distill.compress.observe import Observer
from distill.compress.quantizable import (
    activation_layers,
    default_layers,
    group_width,
    named_layers,
)
from distill.compress.quantizer import (
    GROUP_SIZE,
    QuantSpec,
    default_group_size,
    largest_divisor,
)
from distill.module import Distillation
from distill.processes import ranks
from distill.recipe.capabilities import QuantizedLayers
from distill.remote_code.modeling import CompressionConfig

ACTIVATIONS = (None, "dynamic", "static")
MOMENTUM = 0.05  # weight of a new batch in the moving average of input ranges


class Quantize(Compression):
    """Quantizes weights to 2^bits values while the student trains (quantization-aware training).

    From `start` on, the forward pass uses quantized weights; gradients go straight through to the
    latent weights. With `start: 1.0` there is no training afterwards. By default it quantizes the
    linear layers of the transformer blocks, linear layers outside of them that do not reduce the
    number of features (a pooler, but no classifier), and embeddings of at least 16 rows.

    Args:
        bits: bits per weight, 2 to 8.
        method: ``linear`` (equally spaced values), ``nf4`` (4 bits, quantiles of a normal
            distribution) or ``codebook`` (k-means, fitted again as weights change).
        symmetric: whether linear quantization is symmetric around 0. Default: with 8 bits only.
        group: the weights that share a scale or codebook: ``row`` (an output feature), ``tensor``,
            or a number of neighboring inputs of a row. Default: the tensor for a codebook; the row
            for 8 linear bits; else 64 inputs, or the largest divisor of the width below 64.
        activations: 8-bit quantization of the inputs of linear layers: None, ``dynamic`` (with the
            range of each token) or ``static`` (with a moving average of the training batches'
            ranges).
        embeddings: whether embeddings are quantized, unless `layers` is set.
        layers: patterns of the names of linear layers and embeddings, such as ``*.ffn.lin1``.
        start: when quantization begins: a share of the training, or ``"500 steps"``.
        every: optimizer steps between two updates of codebooks and static ranges.

    Raises:
        UserError: if an argument is out of range, or two are incompatible.

    Example::

        callbacks:
          quantize: {_target_: distill.callbacks.Quantize, bits: 8, activations: dynamic}
    """

    stage = "quantization"

    def __init__(
        self,
        bits: int = 8,
        method: str = "linear",
        symmetric: bool | None = None,
        group: int | str | None = None,
        activations: str | None = None,
        embeddings: bool = True,
        layers: list[str] | None = None,
        start: float | str = 0.3,
        every: int = 20,
    ) -> None:
        super().__init__(start, start, "one_shot", every)
        if activations not in ACTIVATIONS:
            raise self.error(
                f"activations is {activations}, but it must be null, dynamic or static: "
                "choose one of them"
            )
        if symmetric is not None and method != "linear":
            raise self.error(
                f"symmetric is {symmetric}, but method is {method}, and only linear quantization "
                "has this choice: leave symmetric out"
            )
        if isinstance(layers, str):
            raise self.error(f"layers is {layers}, but it must be a list of patterns: [{layers}]")
        with self.prefix_errors():
            self.group = parse_group(group)
        self.bits, self.method = bits, method
        self.symmetric = method == "linear" and (bits == 8 if symmetric is None else symmetric)
        self.activations, self.embeddings, self.layers = activations, embeddings, layers
        self.input_ranges: dict[str, Tensor] = {}  # name of the layer -> [lowest, highest], (2,)
        self._observer: Observer | None = None
        self._observed: dict[str, nn.Module] = {}
        with self.prefix_errors():
            self.spec(GROUP_SIZE)

    def quantization(self) -> QuantizedLayers:
        return QuantizedLayers(
            key=f"callbacks.{self.name}",
            method=self.method,
            bits=self.bits,
            symmetric=self.symmetric,
            group=self.group,
            activations=self.activations,
            restricted=self.layers is not None,
        )

    def spec(self, width: int) -> QuantSpec:
        """How a weight with `width` input features is quantized."""
        if self.group is not None:  # another technique may have changed the width
            group = largest_divisor(width, self.group) if self.group > 0 else self.group
        elif self.method == "linear":
            group = default_group_size(self.bits, width)
        else:
            group = PER_TENSOR if self.method == "codebook" else largest_divisor(width, GROUP_SIZE)
        return QuantSpec(self.method, self.bits, self.symmetric, group)

    def weight_specs(self, student: PreTrainedModel) -> dict[str, QuantSpec]:
        """How the student's tensors are quantized, by name."""
        weights = self.weight_layers(student)
        return {name: self.spec(group_width(layer)) for name, layer in weights.items()}

    def weight_layers(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers whose weights are quantized, by the name of the tensor."""
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        return {names[id(layer.weight)]: layer for layer in self._layers(student).values()}

    def input_layers(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers whose inputs are quantized, by the name of the layer."""
        if self.activations is None:
            return {}
        return activation_layers(student, self._layers(student))

    def _layers(self, student: PreTrainedModel) -> dict[str, Any]:
        with self.prefix_errors():
            if self.layers is None:
                return default_layers(student, self.embeddings)
            return named_layers(student, self.layers)

    def prepare(self, module: Distillation) -> None:
        student, weights = module.student, self.weight_layers(module.student)
        if self.activations is not None and not self.input_layers(student):
            raise self.error(
                f"activations is {self.activations}, but layers names embeddings only, whose "
                "inputs are ids: leave activations out"
            )
        if self._last_step == 0 and self.group is not None:  # widths may change during training
            spec = QuantSpec(self.method, self.bits, self.symmetric, self.group)
            with self.prefix_errors():
                for name, layer in weights.items():
                    spec.check(name, group_width(layer))
        for other in self.other_techniques(module.trainer):
            if isinstance(other, Quantize):
                self._check_disjoint(weights, other.weight_layers(student))
        self._observe(student)
        self._mark_sparse(student)

    def _check_disjoint(self, weights: dict[str, nn.Module], others: dict[str, nn.Module]) -> None:
        if duplicates := sorted(others.keys() & weights):
            raise self.error(
                f"layers has {duplicates[0]}, but another Quantize has it too, and a weight is "
                "quantized once: name layers for each, or set embeddings to false in one"
            )

    def change(self, module: Distillation, amount: float) -> None:
        student = module.student
        self._observe(student)  # other techniques may have replaced layers
        weights = {name: spec.as_dict() for name, spec in self.weight_specs(student).items()}
        unknown = None if self.activations == "dynamic" else [0.0, 0.0]
        activations = dict.fromkeys(self.input_layers(student), unknown)
        compression = CompressionConfig.from_config(student.config)
        compression.weights |= weights
        compression.activations |= activations
        compression.write_to(student.config)
        fake_quant.attach_fake_quant(student, weights, activations)
        self._mark_sparse(student)
        fake_quant.fit_codebooks(student, weights)
        fake_quant.set_ranges(student, self.input_ranges)

    def after_step(self, module: Distillation) -> None:
        self._average_ranges()
        if self.progress < 1:
            self._observe(module.student)
            return
        self._mark_sparse(module.student)
        since = self._last_step - self.schedule.first(module.trainer.max_steps)
        if since % self.every == 0:
            weights = self.weight_layers(module.student)
            fake_quant.fit_codebooks(module.student, weights, refine=True)
        if since % self.every == 0 or since == 1:  # with start 0 no range is known at first
            fake_quant.set_ranges(module.student, self.input_ranges)

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        fake_quant.fold_fake_quant(student)
        return tokenizer

    def _observe(self, student: PreTrainedModel) -> None:
        """Observe the inputs of the current layers; drop ranges of layers that were replaced."""
        layers = self.input_layers(student) if self.activations == "static" else {}
        if list(layers.items()) == list(self._observed.items()):
            return
        if self._observer is not None:
            self._observer.remove()
            self.input_ranges = {
                name: range_2
                for name, range_2 in self._observer.values.items()
                if layers.get(name) is self._observed.get(name)
            }
        self._observer, self._observed = Observer(student, layers, _range, _moving_average), layers
        self._observer.values = self.input_ranges = {
            name: range_2.to(student.device) for name, range_2 in self.input_ranges.items()
        }

    def _average_ranges(self) -> None:
        """Average the ranges over the ranks that have them, so that rank zero can save them."""
        if ranks.world_size() == 1:
            return
        with_count = {
            name: torch.cat([range_2, torch.ones_like(range_2[:1])])
            for name, range_2 in self.input_ranges.items()
        }
        for name, total_3 in ranks.all_reduce_sum_by_name(with_count).items():
            self.input_ranges[name] = total_3[:2] / total_3[2]

    def _mark_sparse(self, student: PreTrainedModel) -> None:
        sparse = CompressionConfig.from_config(student.config).sparse
        fake_quant.mark_sparse(student, sparse)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"input_ranges": dict(self.input_ranges)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.input_ranges = dict(state["input_ranges"])


def _range(input_ND: Tensor) -> Tensor:
    """[lowest, highest], (2,)."""
    return torch.stack([input_ND.amin(), input_ND.amax()])


def _moving_average(average_2: Tensor, batch_2: Tensor) -> Tensor:
    return average_2 + MOMENTUM * (batch_2 - average_2)
