"""Runs of one block on one input, with changes: which linear layers depend on which.

Terms: the consumer of a layer is the first later layer whose input depends on its output; S(row) is
the set of input columns of the consumer that depend on one output row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.models.tiny_models import LENGTH, tiny_outputs
from distill.remote_code.modeling import LINEAR

TOKEN = 2  # the token whose states are changed
_SCALE = 3.0  # of a change: large enough to get a neuron out of the flat part of its activation


class BlockProbe:
    """Runs one block of a tiny model on one input, with changes."""

    def __init__(self, model: PreTrainedModel, block: nn.Module) -> None:
        self.block = block
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.calls = 0
        handle = block.register_forward_pre_hook(self._store, with_kwargs=True)
        tiny_outputs(model)
        handle.remove()
        self.modules = dict(block.named_modules())
        self.base = self.run()
        self.base_output = output_states(self.output)
        self.order = list(dict.fromkeys(name for name, _ in self.base))

    def _store(self, block: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self.arguments = (arguments, named)
        self.calls += 1

    @property
    def states(self) -> Tensor:
        """The hidden states that enter the block."""
        return block_input(*self.arguments)

    @torch.no_grad()
    def run(
        self,
        name: str | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        states: Tensor | None = None,
    ) -> list[tuple[str, Tensor]]:
        """The inputs of all linear layers, in the order of their calls.

        Args:
            name: the layer whose outputs are changed.
            change: the change.
            states: hidden states in place of those that enter the block.
        """
        inputs: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda module, arguments, name=each: inputs.append((name, arguments[0].clone()))
            )
            for each, module in self.block.named_modules()
            if isinstance(module, LINEAR)
        ]
        if name is not None and change is not None:
            hook = self.modules[name].register_forward_hook(lambda m, i, output: change(output))
            handles.append(hook)
        positional, named = self.arguments
        if states is not None:
            positional, named = _with_input(positional, named, states)
        try:
            self.output = self.block(*positional, **named)
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    def consumer(self, name: str) -> str | None:
        """The first later layer whose input depends on the outputs of a layer."""
        after = self.run(name, lambda output: output + _noise(output))
        changed = (
            new for (new, new_input), (_, old) in zip(after, self.base, strict=True)
            if new != name and not torch.equal(new_input, old)
        )  # fmt: skip
        return next(changed, None)

    def columns(self, name: str, row: int, consumer: str) -> set[int]:
        """S(row): the input columns of the consumer that depend on an output row."""

        def change(output: Tensor) -> Tensor:
            output = output.clone()
            output[..., row] += _noise(output[..., row])
            return output

        changed = self._difference(self.run(name, change), consumer)
        return set(changed.flatten(0, -2).any(0).nonzero().flatten().tolist())

    def mixes(self, name: str, row: int, consumer: str) -> bool:
        """Whether an output row at one token reaches the consumer at other tokens."""

        def change(output: Tensor) -> Tensor:
            output, axis = output.clone(), _token_axis(output)
            if axis is None:  # a layer that also projects relative positions
                return output
            selected = output.select(axis, TOKEN)
            selected[..., row] += _noise(selected[..., row])
            return output

        return _elsewhere(self._difference(self.run(name, change), consumer))

    def _difference(self, inputs: list[tuple[str, Tensor]], name: str) -> Tensor:
        pairs = zip(inputs, self.base, strict=True)
        return next(new != old for (each, new), (_, old) in pairs if each == name)

    def reached(self) -> tuple[set[str], set[str]]:
        """Layers whose inputs depend on one token of the block's input: at all, at other tokens."""
        states = self.states.clone()
        selected = states.select(_token_axis(states), TOKEN)
        selected += _noise(selected)
        touched, elsewhere = set(), set()
        for (name, new), (_, old) in zip(self.run(states=states), self.base, strict=True):
            if not torch.equal(new, old):
                touched.add(name)
                if _token_axis(new) is not None and _elsewhere(new != old):
                    elsewhere.add(name)
        return touched, elsewhere


def block_input(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first tensor."""
    return next(value for value in (*positional, *named.values()) if isinstance(value, Tensor))


def _with_input(
    positional: tuple[Any, ...], named: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    old = block_input(positional, named)
    replaced = tuple(states if value is old else value for value in positional)
    return replaced, {key: states if value is old else value for key, value in named.items()}


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return _SCALE * torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _token_axis(states: Tensor) -> Any:
    """The dimension of the tokens; None where there is none."""
    return next((axis for axis, size in enumerate(states.shape[:-1]) if size == LENGTH), None)


def _elsewhere(changed: Tensor) -> bool:
    """Whether any token but TOKEN is changed."""
    tokens = changed.movedim(_token_axis(changed), 0).flatten(1).any(1)
    tokens[TOKEN] = False
    return bool(tokens.any())


def output_states(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, tuple) else output
