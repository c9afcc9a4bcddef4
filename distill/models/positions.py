"""How many positions a model has, measured on a tiny model of its config."""

import json
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from distill.errors import UserError
from distill.models.tiny_models import LENGTH, tiny_config, tiny_inputs, tiny_model

__all__ = ["Positions", "counts_from_padding", "positions"]


@dataclass(frozen=True)
class Positions:
    """The positions of a model."""

    limit: int | None  # the longest input in tokens; None: no limit
    first: int  # row of the position table that the first token takes; 0 without a table


_KNOWN: dict[str, Positions] = {}
_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def positions(config: PreTrainedConfig) -> Positions:
    """The positions that the models of a config have.

    A table of positions limits inputs to its rows from the first used one on. Rotary positions have
    the limit of the config. Relative ones, and those by a slope (ALiBi), have none.
    """
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _KNOWN:
        _KNOWN[key] = _measure(config)
    return _KNOWN[key]


def counts_from_padding(config: PreTrainedConfig) -> bool:
    """Whether position ids start behind the padding id, as RoBERTa's do."""
    first, pad_id = positions(config).first, config.pad_token_id
    if pad_id is None or first != pad_id + 1:
        return False
    small, _ = tiny_config(config)
    small.pad_token_id += 1
    return _measure(small).first == first + 1


@torch.inference_mode(False)  # which also turns gradients on
def _measure(config: PreTrainedConfig) -> Positions:
    declared = next((getattr(config, key) for key in _KEYS if _is_count(config, key)), None)
    try:
        small, _ = tiny_config(config)
        model = tiny_model(small)
        rotated: list[nn.Module] = []
        for module in model.modules():
            if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
                module.register_forward_hook(lambda module, *_: rotated.append(module))
        tables = {
            name: table
            for name, table in model.named_modules()
            if isinstance(table, nn.Embedding) and table is not model.get_input_embeddings()
        }
        short, long = (_used_rows(model, tables, length) for length in (LENGTH - 3, LENGTH))
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return Positions(declared, 0)
    for name, table in tables.items():
        first = min(long[name], default=0)
        if short[name] == [*range(first, first + LENGTH - 3)] and long[name] == [
            *range(first, first + LENGTH)
        ]:
            return Positions(table.num_embeddings - first, first)
    return Positions(declared if rotated else None, 0)


def _is_count(config: PreTrainedConfig, key: str) -> bool:
    value = getattr(config, key, None)
    return type(value) is int and value > 0


def _used_rows(
    model: nn.Module, tables: dict[str, nn.Embedding], length: int
) -> dict[str, list[int]]:
    """The rows of each table that an input reads, one for each token; [] for other tables."""
    model.zero_grad()
    looked_up: dict[nn.Module, int] = {}
    handles = [
        table.register_forward_hook(
            lambda table, _, output: looked_up.update({table: output[..., 0].numel()})
        )
        for table in tables.values()
    ]
    states = model(**tiny_inputs(model, length)).last_hidden_state  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weights).sum().backward()
    return {
        name: table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        if looked_up.get(table) == length and table.weight.grad is not None
        else []
        for name, table in tables.items()
    }
