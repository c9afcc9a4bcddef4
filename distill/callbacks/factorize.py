"""Low-rank factorization of linear layers, whose factors are then trained on."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.callbacks.compression import Compression
from distill.compress import low_rank
from distill.compress.layer_patterns import select_modules
from distill.compress.observe import Observer
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import CompressionConfig, LowRank, in_out_features

__all__ = ["Factorize"]

log = logging.getLogger("distill")


class Factorize(Compression):
    """Replaces linear layers by two factors at `start`, by truncated SVD.

    Layers whose factors would not have fewer parameters are not replaced.

    Args:
        rank: rank of the factors.
        energy: in place of `rank`, the share of the sum of squared singular values that each layer
            keeps, in (0, 1].
        weighted: whether the error of the layers' outputs on the training tokens before `start` is
            minimized, instead of that of the weights.
        layers: patterns of the names of linear layers, such as ``*.ffn.lin1``. Default: all linear
            layers of the transformer blocks.
        start: when layers are replaced: a share of the training, or ``"500 steps"``.

    Raises:
        UserError: if an argument is out of range, or not exactly one of the first two is set.

    Example::

        callbacks:
          factorize: {_target_: distill.callbacks.Factorize, energy: 0.9, weighted: true}
    """

    stage = "factors"

    def __init__(
        self,
        rank: int | None = None,
        energy: float | None = None,
        weighted: bool = False,
        layers: list[str] | None = None,
        start: float | str = 0.3,
    ) -> None:
        super().__init__(start, start, "one_shot", 1)
        if (rank is None) == (energy is None):
            raise self.error(
                f"rank is {rank} and energy is {energy}, but exactly one of them must be given: "
                "give rank=64, or energy=0.9"
            )
        if rank is not None and not (isinstance(rank, int) and rank >= 1):
            raise self.error(f"rank is {rank}, but it must be a whole number from 1: try 64")
        if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
            raise self.error(
                f"energy is {energy}, but it must lie in (0, 1]: 0.9 keeps nine tenths of the "
                "squared singular values"
            )
        self.rank, self.energy, self.weighted, self.layers = rank, energy, weighted, layers
        self._observed: dict[str, nn.Module] = {}
        self._moments: dict[str, Tensor] = {}  # name -> second moment of the layer's inputs
        self._observer: Observer | None = None
        self._ranks: dict[str, int] = {}  # name of a layer that was replaced -> rank

    def final_width(self, student: PreTrainedModel) -> int | None:
        return None if self.progress == 1 else self.rank or -1

    def prepare(self, module: Distillation) -> None:
        if self.progress == 1:  # the layers of a resumed student were replaced already
            return
        layers = self._targets(module.student)
        if self.rank is not None:
            self._check_rank(layers)
        if self.weighted:
            if self.schedule.first(module.trainer.max_steps) == 0:
                raise self.error(
                    "start is 0, but weighted needs inputs of training batches: start later, or "
                    "set weighted to false"
                )
            self._observe(module, layers)

    def after_step(self, module: Distillation) -> None:
        """Observe the new layers if another technique has replaced observed ones."""
        if self._observer is not None:
            layers = self._targets(module.student)
            if [*layers.values()] != [*self._observed.values()]:
                self._observe(module, layers)

    def change(self, module: Distillation, amount: float) -> None:
        self._stop_observing()
        layers = self._targets(module.student)
        moments = {
            name: moment
            for name, moment in ranks.all_reduce_sum_by_name(self._moments).items()
            if len(moment) == in_out_features(layers[name])[0]
        }
        self._moments = {}
        for name, layer in layers.items():
            self._factorize(module.student, name, layer, moments.get(name))
        self._log(layers, moments)
        if self._ranks:
            module.refresh_optimizer_params()

    def rank_synced_state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(rank) for name, rank in self._ranks.items()}

    def state_dict(self) -> dict[str, Any]:
        moments = ranks.all_gather(self._moments)  # Lightning saves the state of rank zero only
        return super().state_dict() | {"moments": moments, "ranks": dict(self._ranks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._moments = ranks.restore_partial_sums(state["moments"])
        self._ranks = dict(state["ranks"])

    def _targets(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers that the recipe selects, without the factors of earlier factorizations."""
        factored = CompressionConfig.from_config(student.config).low_rank
        prefixes = tuple(f"{name}." for name in factored)
        with self.prefix_errors():
            layers = select_modules(student, self.layers)
        layers = {name: layer for name, layer in layers.items() if not name.startswith(prefixes)}
        head = student.get_output_embeddings()
        for name, layer in layers.items():
            if layer is head:
                raise self.error(
                    f"layers has {name}, but this is the output layer over the vocabulary, which "
                    "cannot be factorized: leave it out"
                )
        return layers

    def _check_rank(self, layers: dict[str, nn.Module]) -> None:
        most = max(low_rank.max_rank(*in_out_features(layer)) for layer in layers.values())
        if self.rank is not None and self.rank > most:
            raise self.error(
                f"rank is {self.rank}, but factors of a rank above {most} make no layer smaller: "
                f"set rank to {most} or less"
            )

    def _observe(self, module: Distillation, layers: dict[str, nn.Module]) -> None:
        """Accumulate second moments of the layers' inputs, continuing those of known layers.

        Layers are compared as objects: their names change when blocks before them are removed.
        """
        if self._observed:
            known = {
                layer: self._moments[name]
                for name, layer in self._observed.items()
                if name in self._moments
            }
            self._moments = {name: known[layer] for name, layer in layers.items() if layer in known}
        self._stop_observing()
        self._moments = {
            name: moment.to(module.device)
            for name, moment in self._moments.items()
            if name in layers
        }
        self._observer = Observer(module.student, layers, low_rank.second_moment, _add)
        self._observer.values = self._moments
        self._observed = layers

    def _stop_observing(self) -> None:
        if self._observer is not None:
            self._observer.remove()
        self._observer, self._observed = None, {}

    def _factorize(
        self, student: PreTrainedModel, name: str, layer: nn.Module, moment: Tensor | None
    ) -> None:
        """Replace one layer, unless its factors would have more parameters."""
        weight_OI = weight_of(layer)
        shape = weight_OI.shape
        if self.rank is not None and not low_rank.saves_parameters(self.rank, *shape):
            return
        left_OR, values_R = low_rank.spectrum(weight_OI, moment)
        rank = self.rank or low_rank.rank_for_energy(values_R, self.energy or 1)
        if low_rank.saves_parameters(rank, *shape):
            factors = low_rank.factors(weight_OI, left_OR[:, :rank])
            student.set_submodule(name, factorized(layer, *factors))
            self._ranks[name] = rank
            compression = CompressionConfig.from_config(student.config)
            compression.low_rank[name] = rank
            compression.write_to(student.config)

    def _log(self, layers: dict[str, nn.Module], moments: dict[str, Tensor]) -> None:
        unchanged = [name for name in layers if name not in self._ranks]
        unweighted = [name for name in self._ranks if self.weighted and name not in moments]
        largest = max(self._ranks.values(), default=0)
        log.info(
            "Factorize: replaced %d layers, by factors of rank up to %d", len(self._ranks), largest
        )
        if unchanged:
            log.info(
                "Factorize: %d layers unchanged, as factors would not be smaller: %s",
                *(len(unchanged), ", ".join(unchanged)),
            )
        if unweighted:
            log.warning(
                "Factorize: no inputs were observed of %s, which are factorized unweighted",
                ", ".join(unweighted),
            )


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, (O, I), also of a transposed Conv1D."""
    weight = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def factorized(layer: nn.Module, second_OR: Tensor, first_RI: Tensor) -> LowRank:
    """Build a low-rank layer from two factors; it shares the bias parameter of `layer`."""
    with torch.device("meta"):
        in_features, out_features = first_RI.shape[1], len(second_OR)
        new = LowRank(in_features, out_features, len(first_RI), bias=layer.bias is not None)
    new.first.weight = nn.Parameter(first_RI.contiguous())
    new.second.weight = nn.Parameter(second_OR.contiguous())
    if layer.bias is not None:
        new.second.bias = layer.bias  # type: ignore[assignment]
    return new.train(layer.training)


def _add(total: Tensor, batch: Tensor) -> Tensor:
    """The sum of both; only `batch` if another technique has changed the width."""
    return total + batch if total.shape == batch.shape else batch
