"""A language model whose keys and values are inputs and outputs of its graph: each token that follows is read alone.

B = texts, N = new tokens, P = tokens before them, H = heads of keys, W = their width.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from distill import models
from distill.remote_code.modeling import compression_of

log = logging.getLogger("distill")

PAST, PRESENT = "past_key_values", "present"
ARGUMENTS = (
    "cache",
    "past_key_values",
)  # what a forward calls what it keeps: from transformers 5.24 on, and before
NEAR = 1e-4  # of the largest logit: how close answers by steps must be to those at once
NEAR_ROUNDED = 0.05  # where inputs of layers are rounded, to this level or its neighbour


class CacheEntry(NamedTuple):
    """One of the tensors that are kept, (B, H, P, W), by its name without PAST or PRESENT."""

    name: str
    heads: int
    width: int

    def of(self, texts: int, length: int) -> Tensor:
        return torch.zeros(texts, self.heads, length, self.width)


class GivenCacheLayer(DynamicLayer):
    """Keys and values that are given, of any length: 0 is no other case, as it is to transformers' own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class CachedForward(nn.Module):
    """New tokens, (B, N), the mask of all, (B, P + N), and the states -> logits of the new ones, states of all.

    A token's position is the number of those before it that count, so that texts may be padded on either side; but a sliding window, where
    there is one, also counts padding that lies between tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.argument = model, _argument(model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, *cache_entries = inputs
        layers = [
            GivenCacheLayer(keys, values)
            for keys, values in zip(cache_entries[::2], cache_entries[1::2], strict=True)
        ]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, cache_entries[0].shape[2] :]
        options = {
            "position_ids": positions,
            self.argument: Cache(layers=[*layers]),
            "use_cache": True,
        }
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def cache_entries(model: PreTrainedModel) -> list[CacheEntry]:
    """What the model keeps of a text, where it can be handed back to it; nothing where not, or where its answers then change."""
    if not {_argument(model), "position_ids", "use_cache"} <= models.forward_arguments(model):
        return []
    try:
        with torch.no_grad():
            found = _kept(model)
            return found if found and _holds(model, found) else []
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        log.info("the keys and values of a %s are not cached (%s)", type(model).__name__, error)
        return []


def _argument(model: PreTrainedModel) -> str:
    return next(
        (name for name in ARGUMENTS if name in models.forward_arguments(model)), ARGUMENTS[0]
    )


def _kept(model: PreTrainedModel) -> list[CacheEntry]:
    tokens = _tokens(model, 3)
    cache = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True).get(
        _argument(model)
    )
    if not isinstance(cache, Cache) or not all(
        isinstance(layer, DynamicLayer) and layer.is_initialized for layer in cache.layers
    ):
        return []
    named = (
        (f"{place}.{name}", getattr(layer, f"{name}s"))
        for place, layer in enumerate(cache.layers)
        for name in ("key", "value")
    )
    return [CacheEntry(name, tensor.shape[1], tensor.shape[3]) for name, tensor in named]


def _holds(model: PreTrainedModel, cache_entries: list[CacheEntry]) -> bool:
    """Whether two texts of unequal lengths, the shorter one padded in front, are each continued as it is answered alone and at once."""
    steps, (long, short, more) = CachedForward(model), (5, 3, 2)
    ids, mask = (
        _tokens(model, long + more).repeat(2, 1),
        torch.ones(2, long + more, dtype=torch.long),
    )
    mask[1, : long - short] = 0
    _, *kept = steps(ids[:, :long], mask[:, :long], *(state.of(2, 0) for state in cache_entries))
    continued = steps(ids[:, long:], mask, *kept)[0]
    texts = [row[None, counted.bool()] for row, counted in zip(ids, mask, strict=True)]
    answered = (
        models.logits(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
        for text in texts
    )
    alone = torch.cat([logits[:, -more:] for logits in answered])
    near = NEAR_ROUNDED if compression_of(model.config).get("activations") else NEAR
    return float((continued - alone).abs().max()) <= near * max(1.0, float(alone.abs().max()))


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """One text, of different tokens where there are so many."""
    return torch.arange(count)[None] % len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
