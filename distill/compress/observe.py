"""What passes through chosen modules while the student trains -> a statistic of each, over the tokens that count.

N = tokens that are no padding, D = features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Observer:
    """Gathers `measure(input_ND)` of each module by `merge`: a sum with torch.add, a maximum with torch.maximum.

    It looks at training batches only: validation must not decide what is removed. `values` is its whole state.
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
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._remember_mask, with_kwargs=True)
        ]
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def remove(self) -> None:
        """Stop looking; what was gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _remember_mask(self, model: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        self._mask_BL = None if mask is None else mask.bool()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                value = self.measure(self._tokens(inputs[0]))
                self.values[name] = (
                    self.merge(self.values[name], value) if name in self.values else value
                )

        return hook

    def _tokens(self, input_BLD: Tensor) -> Tensor:
        """The rows of real tokens, in float32; an input without a length (a pooled one) is taken whole."""
        fits = self._mask_BL is not None and input_BLD.shape[:-1] == self._mask_BL.shape
        return (input_BLD[self._mask_BL] if fits else input_BLD.flatten(0, -2)).float()
