"""Graphs of language models with a cache of keys and values as inputs and outputs.

B = texts, N = new tokens, P = tokens before them, H = heads of keys, W = their width.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from distill import models
from distill.remote_code.modeling import CompressionConfig

log = logging.getLogger("distill")

PAST, PRESENT = "past_key_values", "present"
ARGUMENTS = ("cache", "past_key_values")  # of forward: from transformers 5.24 on, and before
NEAR = 1e-4  # largest difference of logits with and without a cache, relative to the largest logit
NEAR_QUANTIZED = 0.05  # the same with quantized inputs of layers, which may round differently


class CacheEntry(NamedTuple):
    """Keys or values of a layer, (B, H, P, W); named as the graph does after PAST or PRESENT."""

    name: str
    heads: int
    width: int

    def zeros(self, texts: int, length: int) -> Tensor:
        """An entry of `length` tokens."""
        return torch.zeros(texts, self.heads, length, self.width)


class GivenCacheLayer(DynamicLayer):
    """A layer of a cache that is initialized with keys and values, which may have no tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class CachedForward(nn.Module):
    """New tokens, (B, N), the mask of all, (B, P + N), and a cache -> their logits, the new cache.

    A token's position is the number of tokens before it, so texts may be padded on either side. A
    sliding window, if there is one, also counts padding between tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.argument = model, _argument(model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, *entries = inputs
        layers = [
            GivenCacheLayer(keys, values)
            for keys, values in zip(entries[::2], entries[1::2], strict=True)
        ]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, entries[0].shape[2] :]
        options = {
            "position_ids": positions,
            self.argument: Cache(layers=[*layers]),
            "use_cache": True,
        }
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def cache_entries(model: PreTrainedModel) -> list[CacheEntry]:
    """The entries of the model's cache; empty if it has none, or one that changes the logits."""
    if not {_argument(model), "position_ids", "use_cache"} <= models.forward_arguments(model):
        return []
    try:
        with torch.no_grad():
            entries = _read_entries(model)
            return entries if entries and _is_equivalent(model, entries) else []
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        log.info("keys and values of a %s are not cached (%s)", type(model).__name__, error)
        return []


def _argument(model: PreTrainedModel) -> str:
    known = models.forward_arguments(model)
    return next((name for name in ARGUMENTS if name in known), ARGUMENTS[0])


def _read_entries(model: PreTrainedModel) -> list[CacheEntry]:
    """The entries that the model returns for a text; empty if they are not keys and values."""
    tokens = _tokens(model, 3)
    outputs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    cache = outputs.get(_argument(model))
    if not isinstance(cache, Cache):
        return []
    if not all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in cache.layers):
        return []
    named = [
        (f"{index}.{name}", getattr(layer, f"{name}s"))
        for index, layer in enumerate(cache.layers)
        for name in ("key", "value")
    ]
    return [CacheEntry(name, tensor.shape[1], tensor.shape[3]) for name, tensor in named]


def _is_equivalent(model: PreTrainedModel, entries: Sequence[CacheEntry]) -> bool:
    """Whether cached logits of two texts, one left-padded, equal those of each text alone."""
    forward, (long, short, more) = CachedForward(model), (5, 3, 2)
    ids = _tokens(model, long + more).repeat(2, 1)
    mask = torch.ones(2, long + more, dtype=torch.long)
    mask[1, : long - short] = 0
    _, *past = forward(ids[:, :long], mask[:, :long], *(entry.zeros(2, 0) for entry in entries))
    continued = forward(ids[:, long:], mask, *past)[0]
    texts = [row[None, row_mask.bool()] for row, row_mask in zip(ids, mask, strict=True)]
    complete = [
        models.logits(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
        for text in texts
    ]
    expected = torch.cat([logits[:, -more:] for logits in complete])
    quantized = CompressionConfig.from_config(model.config).activations
    tolerance = (NEAR_QUANTIZED if quantized else NEAR) * max(1.0, float(expected.abs().max()))
    return float((continued - expected).abs().max()) <= tolerance


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """One text, of distinct tokens unless the vocabulary is smaller."""
    embeddings: Any = model.get_input_embeddings()
    return torch.arange(count)[None] % len(embeddings.weight)
