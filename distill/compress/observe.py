"""Statistics of module inputs, accumulated while a model trains.

Shapes: N = tokens without padding, D = features, B = examples, L = length.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Observer"]


class Observer:
    """Accumulates a statistic of each module's inputs over training batches.

    Batches in eval mode are ignored: validation data must not decide what is removed.

    Args:
        model: the model; its `attention_mask` argument marks padding.
        modules: name -> module to observe.
        measure: input_ND in float32 -> the statistic of a batch.
        merge: (accumulated statistic, statistic of a batch) -> accumulated statistic.

    Attributes:
        values: name -> accumulated statistic; the only state to save.

    Example:
        >>> observer = Observer(model, {"ffn": layer}, lambda input_ND: input_ND.square().sum(0))
        >>> model.train()(**batch); observer.values["ffn"]
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        measure: Callable[[Tensor], Tensor],
        merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> None:
        self.measure, self.merge = measure, merge
        self.values: dict[str, Tensor] = {}
        self._mask_BL: Tensor | None = None
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._store_mask, with_kwargs=True)
        ]
        for name, module in modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._measure_inputs(name)))

    def remove(self) -> None:
        """Remove the hooks; `values` stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _store_mask(self, model: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        self._mask_BL = None if mask is None else mask.bool()

    def _measure_inputs(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                self._merge(name, self.measure(self._tokens(inputs[0])))

        return hook

    def _merge(self, name: str, value: Tensor) -> None:
        self.values[name] = self.merge(self.values[name], value) if name in self.values else value

    def _tokens(self, input_BLD: Tensor) -> Tensor:
        """Inputs at tokens that are not padding, (N, D) in float32; pooled inputs have none."""
        masked = self._mask_BL is not None and input_BLD.shape[:-1] == self._mask_BL.shape
        return (input_BLD[self._mask_BL] if masked else input_BLD.flatten(0, -2)).float()
