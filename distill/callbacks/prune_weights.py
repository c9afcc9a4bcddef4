"""Pruning by weight: single weights of linear layers become zero and stay so, while the others go on learning."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.callbacks.base import (
    STAGES,
    Compression,
    compression_config,
    expand_low_rank,
    select_modules,
)
from distill.callbacks.factorize import Factorize
from distill.callbacks.prune_structure import PruneNeurons
from distill.compress import masks, scores, structure
from distill.compress.observe import Observer
from distill.models import blocks
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import LINEAR, LowRank, in_out_features

SCORES = ("magnitude", "movement", "wanda")


class PruneWeights(Compression):
    """Removes a share (`sparsity`) of the weights, or all but N of every M neighbours along the input (`pattern`: "2:4").

    `score` says which go first: the smallest ("magnitude"), those that matter least for the inputs they meet ("wanda"), or those
    that training moved towards zero ("movement"). `scope` says what they are compared with: the weights of their "layer", of their
    output "row", or of all layers ("global"); null is the row for Wanda, else the layer. Towards a
    pattern it says the same of the weights that N:M can do without, null being the layer.

    The mask is made anew each time that the schedule goes on, with exactly its share of the target; the last is final. By magnitude
    and by Wanda, what is removed stays removed. By movement, the value of a removed weight is put aside and its score goes on as if
    it were in place (Sanh et al. 2020); it comes back with that value when a later mask keeps it.

    Wanda looks at the inputs since the last mask, those of the student as it is; movement adds up its scores from the first step on.
    """

    stage = "sparsity"

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        score: str = "magnitude",
        scope: str | None = None,
        layers: list[str] | None = None,
        start: float = 0.1,
        end: float = 0.6,
        shape: str = "cubic",
        every: int = 10,
    ) -> None:
        super().__init__(start, end, shape, every)
        scope = scope or ("row" if score == "wanda" and pattern is None else "layer")
        for key, value, known in (("score", score, SCORES), ("scope", scope, tuple(masks.SCOPES))):
            if value not in known:
                raise self.error(
                    f"{key} is {value}, but it must be one of {', '.join(known)}: choose one of them"
                )
        if isinstance(layers, str):
            raise self.error(f"layers is {layers}, but it must be a list of patterns: [{layers}]")
        self.group = self._group(sparsity, pattern)  # (N, M)
        self.sparsity = (
            float(sparsity or 0) if self.group is None else 1 - self.group[0] / self.group[1]
        )
        self.score, self.scope, self.layers = score, scope, layers
        self.masks: dict[
            str, Tensor
        ] = {}  # name of the weight -> True where it is kept, in its own layout
        self.statistics: dict[
            str, Tensor
        ] = {}  # name of the weight -> square sums of its inputs (I,), or its scores of movement
        self.aside: dict[
            str, Tensor
        ] = {}  # name of the weight -> by movement, the values removed until the last mask, 0 where kept
        self._observer: Observer | None = None

    def _group(self, sparsity: float | None, pattern: str | None) -> tuple[int, int] | None:
        if (sparsity is None) == (pattern is None):
            rule = "exactly one of the two must be given: sparsity=0.5, or pattern='2:4'"
            raise self.error(f"sparsity is {sparsity} and pattern is {pattern}, but {rule}")
        if sparsity is not None and not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
            raise self.error(
                f"sparsity is {sparsity}, but it must lie in [0, 1): 0.5 removes half of the weights"
            )
        with self.prefix_errors():
            return None if pattern is None else masks.parse_pattern(pattern)

    def prepare(self, module: Distillation) -> None:
        """Refuse, before the first step, what cannot be: layers that are not there, widths that do not fit, nothing to judge by."""
        layers = self._layers(module.student)
        if self.group is not None:
            with self.prefix_errors():
                for name, layer in layers.items():
                    masks.check_width(name, in_out_features(layer)[0], *self.group)
        self._check_others(module)
        total, settled = module.trainer.max_steps, self._settled(module.trainer)
        if self.score != "magnitude" and self.schedule.at(settled, total) > 0:
            raise self.error(
                f"the first mask is due at step {self.schedule.first(total)}, but {self.score} judges by the steps since "
                f"step {settled}, when the layers have their form: start at least a step later, or choose magnitude"
            )

    def _check_others(self, module: Distillation) -> None:
        """A weight has one mask, and the pattern must divide the widths that other techniques will leave."""
        student = module.student
        for other in self.other_techniques(module.trainer):
            if isinstance(other, PruneWeights):
                twice = sorted(other._layers(student).keys() & self._layers(student))
                if twice:
                    rule = "but another PruneWeights has it too, and a weight has one mask"
                    raise self.error(f"layers has {twice[0]}, {rule}: name layers for each")
            width = _width_to_come(other, student)
            if self.group is not None and width is not None and width % self.group[1]:
                rule = f"but {type(other).__name__} leaves layers with {width if width > 0 else 'unequal numbers of'} inputs"
                raise self.error(
                    f"pattern is {self.group[0]}:{self.group[1]}, {rule}: choose a width that {self.group[1]} divides"
                )

    def _settled(self, trainer: L.Trainer) -> int:
        """The step from which on no technique of an earlier stage changes the layers."""
        earlier = STAGES[: STAGES.index(self.stage)]
        return max(
            [
                0,
                *(
                    other.schedule.last(trainer.max_steps)
                    for other in self.other_techniques(trainer)
                    if other.stage in earlier
                ),
            ]
        )

    def _layers(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The linear layers to act on, as the student is now: a factorized layer stands for its two factors."""
        with self.prefix_errors():
            layers = expand_low_rank(select_modules(student, self.layers, (*LINEAR, LowRank)))
        embedding = student.get_input_embeddings().weight
        for name, layer in layers.items():
            if layer.weight is embedding:
                raise self.error(
                    f"layers has {name}, but its weight is that of the embeddings, which are looked up: leave it out"
                )
        return layers

    # ---- what the scores need: gathered in each step, whole on every rank when the step is over

    @property
    def _gathering(self) -> bool:
        return self.reached < 1 and self.score != "magnitude"

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Wanda looks anew at each optimizer step, since other techniques may replace layers between them."""
        if self._gathering and self.score == "wanda" and self._observer is None:
            assert isinstance(module, Distillation)
            self._observer = Observer(
                module.student,
                self._layers(module.student),
                lambda input_ND: input_ND.square().sum(0),
            )

    def _look(self, module: Distillation) -> None:
        if self._observer is not None:
            self._observer.remove()
            for name, sums_I in ranks.all_reduce_sum_by_name(self._observer.values).items():
                self.statistics[f"{name}.weight"] = self._so_far(f"{name}.weight", sums_I) + sums_I
            self._observer = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Movement counts all gradients; then those of removed weights go, for they shall not count when gradients are clipped."""
        assert isinstance(module, Distillation)
        if self._gathering and self.score == "movement":
            self._move(module.student)
        for name, mask in self._on_device(module.student):
            gradient = module.student.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def _move(self, student: PreTrainedModel) -> None:
        for name, layer in self._layers(student).items():
            name, weight = f"{name}.weight", layer.weight
            assert isinstance(weight, nn.Parameter)
            if weight.grad is not None:
                gradient = weight.grad.nan_to_num(
                    0, 0, 0
                )  # float16 overflows now and then; the loss scaler then leaves out the step
                whole = (
                    weight + self.aside[name].to(weight.device) if name in self.aside else weight
                )
                self.statistics[name] = scores.movement(self._so_far(name, weight), whole, gradient)

    def _so_far(self, name: str, like: Tensor) -> Tensor:
        """What was gathered of a weight; zeros at first, where no batch came through it, and where its layer has a new form."""
        before = self.statistics.get(name)
        return (
            torch.zeros_like(like)
            if before is None or before.shape != like.shape
            else before.to(like.device)
        )

    # ---- masks

    @torch.no_grad()
    def change(self, module: Distillation, amount: float) -> None:
        layers = self._layers(module.student)
        scores_OI = {
            f"{name}.weight": self._score(f"{name}.weight", layer) for name, layer in layers.items()
        }
        if self.group is not None:
            spared = masks.n_of_m(scores_OI, *self.group)
            scores_OI = {
                name: score.masked_fill(spared[name], torch.inf)
                for name, score in scores_OI.items()
            }
        kept_OI = masks.SCOPES[self.scope](scores_OI, amount * self.sparsity)
        self.masks = {
            f"{name}.weight": _oriented(layer, kept_OI[f"{name}.weight"]).contiguous()
            for name, layer in layers.items()
        }
        if self.score == "movement":
            self._set_aside(module.student)
        if self.score == "wanda" or amount == 1:
            self.statistics, self.aside = {}, {}
        compression = compression_config(module.student)
        compression["sparse"] = sorted({*compression.get("sparse", []), *self.masks})
        self._hold(module)

    def _score(self, name: str, layer: nn.Module) -> Tensor:
        """(O, I): the lowest go first."""
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if self.score == "movement":
            return _oriented(layer, self._so_far(name, weight))
        weight_OI = _oriented(layer, weight)
        score_OI = scores.magnitude(weight_OI)
        if self.score == "wanda":
            score_OI = scores.wanda(weight_OI, self._so_far(name, weight_OI[0]))
        return (
            score_OI.masked_fill(~_oriented(layer, self.masks[name]), -torch.inf)
            if name in self.masks
            else score_OI
        )

    def _set_aside(self, student: PreTrainedModel) -> None:
        for name, mask in self.masks.items():
            weight = student.get_parameter(name)
            if name in self.aside:
                weight.add_(self.aside[name].to(weight.device))
            self.aside[name] = weight.masked_fill(mask, 0)

    def after_step(self, module: Distillation) -> None:
        self._look(module)
        self._hold(module)

    @torch.no_grad()
    def _hold(self, module: Distillation) -> None:
        """Removed weights are zero, and so are their moments: one that comes back starts afresh."""
        state = module.trainer.optimizers[0].state
        for name, mask in self._on_device(module.student):
            weight = module.student.get_parameter(name)
            moments = [
                value
                for value in state.get(weight, {}).values()
                if isinstance(value, Tensor) and value.shape == weight.shape
            ]
            for tensor in (weight, *moments):
                tensor.masked_fill_(
                    ~mask, 0
                )  # and not by product, which would leave zeros of both signs

    def _on_device(self, student: PreTrainedModel) -> list[tuple[str, Tensor]]:
        self.masks = {
            name: mask.to(student.get_parameter(name).device) for name, mask in self.masks.items()
        }
        return list(self.masks.items())

    def rank_synced_state(self) -> dict[str, Tensor]:
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "masks": self.masks,
            "statistics": self.statistics,
            "aside": self.aside,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.masks, self.statistics, self.aside = (
            state["masks"],
            state["statistics"],
            state["aside"],
        )


def _width_to_come(other: Compression, student: PreTrainedModel) -> int | None:
    """Inputs of the layers that another technique will narrow; -1 where that is not known yet, null where it narrows none."""
    if isinstance(other, PruneNeurons) and other.reached < 1:
        count = structure.neurons(student, blocks(student)[0]).count
        return count - round(other.amount * count) if other.equal else -1
    return (other.rank or -1) if isinstance(other, Factorize) and other.reached < 1 else None


def _oriented(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A linear layer's weight or mask as (O, I), or back from it: GPT-2's are transposed."""
    return tensor.T if isinstance(layer, Conv1D) else tensor
