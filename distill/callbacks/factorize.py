"""Low-rank factorization: linear layers become the product of two thin ones, which then go on learning."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.callbacks.base import Compression, compression_config, select_modules
from distill.compress import low_rank
from distill.compress.observe import Observer
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import LowRank, in_out_features

log = logging.getLogger("distill")


class Factorize(Compression):
    """Replaces linear layers by two factors of a fixed rank, or of the rank that keeps a share of their energy, at `start`.

    Energy is the sum of squared singular values. `weighted`: what counts is the error of the layers' outputs on the training tokens
    seen before `start`, not that of the weights. Layers that factors would not make smaller are left as they are.
    """

    stage = "factors"

    def __init__(
        self,
        rank: int | None = None,
        energy: float | None = None,
        weighted: bool = False,
        layers: list[str] | None = None,
        start: float = 0.3,
    ) -> None:
        super().__init__(start, start, "one_shot", 1)
        if (rank is None) == (energy is None):
            raise self.error(
                f"rank is {rank} and energy is {energy}, but exactly one is needed: give rank=64, or energy=0.9"
            )
        if rank is not None and not (isinstance(rank, int) and rank >= 1):
            raise self.error(f"rank is {rank}, but it must be a whole number from 1: 64, say")
        if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
            raise self.error(
                f"energy is {energy}, but it must lie in (0, 1]: 0.9 keeps nine tenths of the squared singular values"
            )
        self.rank, self.energy, self.weighted, self.layers = rank, energy, weighted, layers
        self._watched: dict[str, nn.Module] = {}
        self._moments: dict[str, Tensor] = {}  # second moments of each layer's inputs
        self._observer: Observer | None = None
        self._ranks: dict[str, int] = {}

    def prepare(self, module: Distillation) -> None:
        if self.reached == 1:  # a resumed student is made of factors already
            return
        layers = self._targets(module.student)
        if self.rank is not None:
            self._check_rank(layers)
        if self.weighted:
            if self.schedule.first(module.trainer.max_steps) == 0:
                raise self.error(
                    "start is 0, but weighted needs inputs seen in training: start later, or set weighted to false"
                )
            self._watch(module, layers)

    def after_step(self, module: Distillation) -> None:
        """What was pruned away or replaced in this step is not watched any more; what took its place is."""
        if self._observer is not None:
            layers = self._targets(module.student)
            if [*layers.values()] != [*self._watched.values()]:
                self._watch(module, layers)

    def change(self, module: Distillation, amount: float) -> None:
        self._stop_watching()
        layers = self._targets(module.student)
        moments = {
            name: moment
            for name, moment in ranks.all_reduce_sum_by_name(self._moments).items()
            if len(moment) == in_out_features(layers[name])[0]
        }
        self._moments = {}
        for name, layer in layers.items():
            self._factorize(module.student, name, layer, moments.get(name))
        self._report(layers, moments)
        if self._ranks:
            module.refresh_optimizer_params()

    def rank_synced_state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(rank) for name, rank in self._ranks.items()}

    def state_dict(self) -> dict[str, Any]:
        moments = ranks.all_gather(
            self._moments
        )  # Lightning asks all ranks, and keeps what the first says
        return super().state_dict() | {"moments": moments, "ranks": dict(self._ranks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._moments, self._ranks = (
            ranks.restore_partial_sums(state["moments"]),
            dict(state["ranks"]),
        )

    def _targets(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers that the recipe chose, but for halves of layers that were factorized before."""
        made = [f"{name}." for name in compression_config(student).get("low_rank", {})]
        with self.prefix_errors():
            found = {
                name: layer
                for name, layer in select_modules(student, self.layers).items()
                if not name.startswith(tuple(made))
            }
        head = student.get_output_embeddings()
        for name, layer in found.items():
            if layer is head:
                raise self.error(
                    f"layers has {name}, but that is the head over the vocabulary, which stays whole: leave it out"
                )
        return found

    def _check_rank(self, layers: dict[str, nn.Module]) -> None:
        most = max(low_rank.largest(*in_out_features(layer)) for layer in layers.values())
        if self.rank is not None and self.rank > most:
            raise self.error(
                f"rank is {self.rank}, but from {most + 1} on factors make no layer smaller: set rank to {most} or less"
            )

    def _watch(self, module: Distillation, layers: dict[str, nn.Module]) -> None:
        """Gather second moments; what was gathered of a layer that is still the same one is kept, under its present name."""
        if self._watched:
            known = {
                layer: self._moments[name]
                for name, layer in self._watched.items()
                if name in self._moments
            }
            self._moments = {name: known[layer] for name, layer in layers.items() if layer in known}
        self._stop_watching()
        self._moments = {
            name: moment.to(module.device)
            for name, moment in self._moments.items()
            if name in layers
        }
        self._observer = Observer(module.student, layers, low_rank.second_moment, _added)
        self._observer.values = self._moments
        self._watched = layers

    def _stop_watching(self) -> None:
        if self._observer is not None:
            self._observer.remove()
        self._observer, self._watched = None, {}

    def _factorize(
        self, student: PreTrainedModel, name: str, layer: nn.Module, moment: Tensor | None
    ) -> None:
        """Replace one layer, unless its factors would hold more numbers than it does."""
        weight_OI = weight_of(layer)
        out, inputs = weight_OI.shape
        if self.rank is not None and not low_rank.worthwhile(self.rank, out, inputs):
            return
        left_OR, values_R = low_rank.spectrum(weight_OI, moment)
        rank = self.rank or low_rank.rank_of(values_R, self.energy or 1)
        if low_rank.worthwhile(rank, out, inputs):
            student.set_submodule(
                name, factorized(layer, *low_rank.factors(weight_OI, left_OR[:, :rank]))
            )
            compression_config(student).setdefault("low_rank", {})[name] = self._ranks[name] = rank

    def _report(self, layers: dict[str, nn.Module], moments: dict[str, Tensor]) -> None:
        whole = [name for name in layers if name not in self._ranks]
        unseen = [name for name in self._ranks if self.weighted and name not in moments]
        log.info(
            "%d layers are factorized, with ranks up to %d",
            len(self._ranks),
            max(self._ranks.values(), default=0),
        )
        if whole:
            log.info(
                "%d layers are left whole, for factors would be no smaller: %s",
                len(whole),
                ", ".join(whole),
            )
        if unseen:
            log.warning(
                "factorized unweighted, for nothing has passed them since they were replaced: %s",
                ", ".join(unseen),
            )


def weight_of(layer: nn.Module) -> Tensor:
    """The weight, (O, I), also of GPT-2's transposed layers."""
    weight = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def factorized(layer: nn.Module, second_OR: Tensor, first_RI: Tensor) -> LowRank:
    """The layer as two; its bias is the same parameter, so that the optimizer knows it."""
    with torch.device("meta"):
        made = LowRank(
            first_RI.shape[1], len(second_OR), len(first_RI), bias=layer.bias is not None
        )
    made.first.weight, made.second.weight = (
        nn.Parameter(factor.contiguous()) for factor in (first_RI, second_OR)
    )
    if layer.bias is not None:
        made.second.bias = layer.bias  # type: ignore[assignment]
    return made.train(layer.training)


def _added(gathered: Tensor, more: Tensor) -> Tensor:
    """Their sum; after a change of width only what came then."""
    return gathered + more if gathered.shape == more.shape else more
