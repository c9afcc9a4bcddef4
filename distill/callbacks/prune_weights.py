"""Pruning of individual weights: they are set to zero and stay zero while the others are trained.

Shapes: O = output features, I = input features, N = tokens, D = features.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.callbacks.compression import STAGES, Compression
from distill.compress import masks, scores
from distill.compress.layer_patterns import expand_low_rank, select_modules
from distill.compress.observe import Observer
from distill.compress.quantizable import shares_embedding_weight
from distill.module import Distillation
from distill.processes import ranks
from distill.remote_code.modeling import LINEAR, CompressionConfig, LowRank, in_out_features

__all__ = ["PruneWeights"]

SCORES = ("magnitude", "movement", "wanda")


class PruneWeights(Compression):
    """Sets a share of the weights of linear layers to zero, by masks that follow a schedule.

    The mask at `end` is final. With ``magnitude`` and ``wanda``, pruned weights stay pruned. With
    ``movement``, the value of a pruned weight is stored and its score is still updated (Sanh et al.
    2020): the value is restored if a later mask keeps the weight.

    Args:
        sparsity: share of the weights to remove, in [0, 1).
        pattern: in place of `sparsity`, N:M as text: ``"2:4"`` keeps 2 of every 4 neighboring
            inputs. The other weights are removed gradually, until `end`.
        score: which weights are removed first: ``magnitude`` (the smallest), ``wanda`` (the
            smallest product with the norm of their inputs since the last mask) or ``movement``
            (those that training moves towards zero, since its first step).
        scope: the weights among which scores are compared: those of a ``layer``, of an output
            ``row``, or of all layers (``global``). Default: the row for Wanda without a pattern,
            else the layer.
        layers: patterns of the names of linear layers, such as ``*.ffn.lin1``. Default: all linear
            layers of the transformer blocks.
        start: when pruning begins: a share of the training, or ``"500 steps"``.
        end: when the target is reached, likewise.
        shape: shape of the schedule: ``cubic``, ``linear`` or ``one_shot``.
        every: optimizer steps between two masks.

    Raises:
        UserError: if an argument is out of range, or not exactly one of the first two is set.

    Example::

        callbacks:
          prune: {_target_: distill.callbacks.PruneWeights, sparsity: 0.8, score: movement}
    """

    stage = "sparsity"

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        score: str = "magnitude",
        scope: str | None = None,
        layers: list[str] | None = None,
        start: float | str = 0.1,
        end: float | str = 0.6,
        shape: str = "cubic",
        every: int = 10,
    ) -> None:
        super().__init__(start, end, shape, every)
        scope = scope or ("row" if score == "wanda" and pattern is None else "layer")
        for key, value, known in (("score", score, SCORES), ("scope", scope, tuple(masks.SCOPES))):
            if value not in known:
                choices = ", ".join(known)
                raise self.error(f"{key} is {value}, but it must be one of {choices}: choose one")
        if isinstance(layers, str):
            raise self.error(f"layers is {layers}, but it must be a list of patterns: [{layers}]")
        self.pattern = self._parse_target(sparsity, pattern)
        self.sparsity = float(sparsity or 0)
        if self.pattern is not None:
            self.sparsity = 1 - self.pattern[0] / self.pattern[1]
        self.score, self.scope, self.layers = score, scope, layers
        # By name of the weight: `masks` in the weight's layout; `statistics`, the sums of squared
        # inputs (I,) or the movement scores; `removed_values`, with movement, the values that the
        # last mask set to 0, and 0 elsewhere.
        self.masks: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.removed_values: dict[str, Tensor] = {}
        self._observer: Observer | None = None

    def _parse_target(self, sparsity: float | None, pattern: str | None) -> tuple[int, int] | None:
        """(N, M) of a pattern; None for a sparsity."""
        if (sparsity is None) == (pattern is None):
            raise self.error(
                f"sparsity is {sparsity} and pattern is {pattern}, but exactly one of them must be "
                "given: sparsity=0.5, or pattern='2:4'"
            )
        if sparsity is not None and not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
            raise self.error(
                f"sparsity is {sparsity}, but it must lie in [0, 1): 0.5 removes half the weights"
            )
        with self.prefix_errors():
            return None if pattern is None else masks.parse_pattern(pattern)

    def prepare(self, module: Distillation) -> None:
        layers = self._layers(module.student)
        if self.pattern is not None:
            with self.prefix_errors():
                for name, layer in layers.items():
                    masks.check_width(name, in_out_features(layer)[0], *self.pattern)
        for other in self.other_techniques(module.trainer):
            self._check_other(other, module.student)
        total, stable = module.trainer.max_steps, self._first_stable_step(module.trainer)
        if self.score != "magnitude" and self.schedule.at(stable, total) > 0:
            raise self.error(
                f"the first mask is due at step {self.schedule.first(total)}, but {self.score} "
                f"needs training steps after step {stable}, when no technique changes the layers "
                "any more: start at least a step later, or choose magnitude"
            )

    def _check_other(self, other: Compression, student: PreTrainedModel) -> None:
        """Check that layers have one mask, and that the pattern fits widths that will change."""
        duplicates: list[str] = []
        if isinstance(other, PruneWeights):
            duplicates = sorted(other._layers(student).keys() & self._layers(student))
        if duplicates:
            raise self.error(
                f"layers has {duplicates[0]}, but another PruneWeights has it too, and a weight "
                "has one mask: name layers for each"
            )
        width = other.final_width(student)
        if self.pattern is not None and width is not None and width % self.pattern[1]:
            inputs = width if width > 0 else "unequal numbers of"
            raise self.error(
                f"pattern is {self.pattern[0]}:{self.pattern[1]}, but {type(other).__name__} "
                f"leaves layers with {inputs} inputs: choose a width that {self.pattern[1]} divides"
            )

    def _first_stable_step(self, trainer: L.Trainer) -> int:
        """The first step after which no technique of an earlier stage changes the layers."""
        earlier = STAGES[: STAGES.index(self.stage)]
        others = [other for other in self.other_techniques(trainer) if other.stage in earlier]
        return max([0, *(other.schedule.last(trainer.max_steps) for other in others)])

    def _layers(self, student: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers to prune in the current student; of a low-rank layer, its two factors."""
        with self.prefix_errors():
            layers = expand_low_rank(select_modules(student, self.layers, (*LINEAR, LowRank)))
        for name, layer in layers.items():
            if shares_embedding_weight(student, layer):
                raise self.error(
                    f"layers has {name}, but it shares its weight with the embeddings, which "
                    "cannot be pruned: leave it out"
                )
        return layers

    # Statistics are reduced over the ranks in each step: only rank zero writes the checkpoint.

    @property
    def _gathers(self) -> bool:
        return self.progress < 1 and self.score != "magnitude"

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """For Wanda, observe inputs; with new hooks in each step, since layers may be replaced."""
        if self._gathers and self.score == "wanda" and self._observer is None:
            assert isinstance(module, Distillation)
            layers = self._layers(module.student)
            self._observer = Observer(module.student, layers, _square_sums)

    def _add_inputs(self) -> None:
        if self._observer is not None:
            self._observer.remove()
            for layer, sums_I in ranks.all_reduce_sum_by_name(self._observer.values).items():
                name = f"{layer}.weight"
                self.statistics[name] = self._statistic(name, sums_I) + sums_I
            self._observer = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update movement scores, then zero the gradients of pruned weights before clipping."""
        assert isinstance(module, Distillation)
        if self._gathers and self.score == "movement":
            self._add_movement(module.student)
        for name, mask in self._masks_on_device(module.student):
            gradient = module.student.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def _add_movement(self, student: PreTrainedModel) -> None:
        for layer_name, layer in self._layers(student).items():
            name, weight = f"{layer_name}.weight", layer.weight
            assert isinstance(weight, nn.Parameter)
            if weight.grad is None:
                continue
            gradient = weight.grad.nan_to_num(0, 0, 0)  # fp16 overflow: the step will be skipped
            value: Tensor = weight
            if name in self.removed_values:
                value = weight + self.removed_values[name].to(weight.device)
            score = self._statistic(name, weight)
            self.statistics[name] = scores.movement(score, value, gradient)

    def _statistic(self, name: str, like: Tensor) -> Tensor:
        """The accumulated statistic; zeros if there is none or the weight's shape has changed."""
        value = self.statistics.get(name)
        if value is None or value.shape != like.shape:
            return torch.zeros_like(like)
        return value.to(like.device)

    @torch.no_grad()
    def change(self, module: Distillation, amount: float) -> None:
        layers = {f"{name}.weight": layer for name, layer in self._layers(module.student).items()}
        scores_OI = {name: self._score(name, layer) for name, layer in layers.items()}
        if self.pattern is not None:  # weights that the pattern keeps must not be pruned earlier
            for name, mask in masks.n_of_m(scores_OI, *self.pattern).items():
                scores_OI[name] = scores_OI[name].masked_fill(mask, torch.inf)
        kept_OI = masks.SCOPES[self.scope](scores_OI, amount * self.sparsity)
        self.masks = {
            name: _transpose(layer, kept_OI[name]).contiguous() for name, layer in layers.items()
        }
        if self.score == "movement":
            self._store_removed_values(module.student)
        if self.score == "wanda" or amount == 1:
            self.statistics, self.removed_values = {}, {}
        compression = CompressionConfig.from_config(module.student.config)
        compression.sparse = sorted({*compression.sparse, *self.masks})
        compression.write_to(module.student.config)
        self._apply_masks(module)

    def _score(self, name: str, layer: nn.Module) -> Tensor:
        """Scores of a layer's weights, (O, I); -inf for those that stay pruned."""
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if self.score == "movement":
            return _transpose(layer, self._statistic(name, weight))
        weight_OI = _transpose(layer, weight)
        score_OI = scores.magnitude(weight_OI)
        if self.score == "wanda":
            score_OI = scores.wanda(weight_OI, self._statistic(name, weight_OI[0]))
        if name not in self.masks:
            return score_OI
        return score_OI.masked_fill(~_transpose(layer, self.masks[name]), -torch.inf)

    def _store_removed_values(self, student: PreTrainedModel) -> None:
        for name, mask in self.masks.items():
            weight = student.get_parameter(name)
            if name in self.removed_values:
                weight.add_(self.removed_values[name].to(weight.device))
            self.removed_values[name] = weight.masked_fill(mask, 0)

    def after_step(self, module: Distillation) -> None:
        self._add_inputs()
        self._apply_masks(module)

    @torch.no_grad()
    def _apply_masks(self, module: Distillation) -> None:
        """Set pruned weights and their moments to 0; a restored weight starts with new moments."""
        state = module.trainer.optimizers[0].state
        for name, mask in self._masks_on_device(module.student):
            weight = module.student.get_parameter(name)
            for tensor in (weight, *state.get(weight, {}).values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    tensor.masked_fill_(~mask, 0)  # a product would give zeros of both signs

    def _masks_on_device(self, student: PreTrainedModel) -> list[tuple[str, Tensor]]:
        self.masks = {
            name: mask.to(student.get_parameter(name).device) for name, mask in self.masks.items()
        }
        return list(self.masks.items())

    def rank_synced_state(self) -> dict[str, Tensor]:
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        parts = ("masks", "statistics", "removed_values")
        return super().state_dict() | {part: getattr(self, part) for part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.masks, self.statistics = state["masks"], state["statistics"]
        self.removed_values = state["removed_values"]


def _square_sums(input_ND: Tensor) -> Tensor:
    """Sum of the square of each input feature over tokens, (D,)."""
    return input_ND.square().sum(0)


def _transpose(layer: nn.Module, tensor: Tensor) -> Tensor:
    """From the layout of a layer's weight to (O, I), and back. Conv1D weights are (I, O)."""
    return tensor.T if isinstance(layer, Conv1D) else tensor
