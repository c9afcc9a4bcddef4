"""Which layers of a student are quantized, in training and after it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill import internals
from distill.compress.layer_patterns import expand_low_rank, select_modules
from distill.remote_code.modeling import LINEAR, LowRank, in_out_features

__all__ = [
    "activation_layers",
    "computes_linear",
    "default_layers",
    "group_width",
    "named_layers",
    "shares_embedding_weight",
]

MIN_EMBEDDING_ROWS = 16  # a smaller embedding would save next to nothing
_FACTORABLE = (*LINEAR, LowRank)
_LAYERS = (*LINEAR, nn.Embedding)


def default_layers(student: PreTrainedModel, embeddings: bool = True) -> dict[str, Any]:
    """The layers whose weights are quantized by default.

    These are the linear layers of the transformer blocks; outside of them the linear layers that do
    not reduce the number of features (a pooler, but no classifier) and do not share their weight
    with the embeddings; and embeddings of at least 16 rows. A low-rank layer is replaced by its
    factors.

    Args:
        student: the model to search.
        embeddings: whether embeddings are quantized.

    Returns:
        Name -> layer, in the order of `named_modules`.
    """
    in_blocks = select_modules(student, None, _FACTORABLE)

    def is_selected(name: str, layer: nn.Module) -> bool:
        if isinstance(layer, nn.Embedding):
            return embeddings and layer.num_embeddings >= MIN_EMBEDDING_ROWS
        if name in in_blocks or not isinstance(layer, nn.Linear | LowRank):
            return name in in_blocks
        narrows = layer.out_features < layer.in_features
        return not narrows and not shares_embedding_weight(student, layer)

    selected = {name: layer for name, layer in student.named_modules() if is_selected(name, layer)}
    return expand_low_rank(selected, _LAYERS)


def named_layers(student: PreTrainedModel, patterns: list[str]) -> dict[str, Any]:
    """The layers that a recipe quantizes by name. See :func:`select_modules`."""
    return expand_low_rank(select_modules(student, patterns, (*_FACTORABLE, nn.Embedding)), _LAYERS)


def activation_layers(
    student: PreTrainedModel, layers: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Select the layers whose inputs may be quantized.

    These are the linear layers, without an output layer that shares its weight with the embeddings:
    that weight is stored for look-ups, not for integer matrix products.
    """
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, LINEAR) and not shares_embedding_weight(student, layer)
    }


def shares_embedding_weight(student: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether the weight of a layer is the input embedding, as in a tied output layer."""
    embedding = student.get_input_embeddings().weight
    return internals.stored_parameter(layer, "weight") is embedding


def group_width(layer: nn.Module) -> int:
    """The dimension that `group` divides: input features, or the width of an embedding."""
    return layer.embedding_dim if isinstance(layer, nn.Embedding) else in_out_features(layer)[0]


def computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a model's own linear layer, such as Falcon's, computes the same as nn.Linear."""
    input_NI = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    with torch.random.fork_rng(devices=[]):
        try:
            layer = kind(2, 3)
        except TypeError:  # it takes other arguments
            return False
    return torch.allclose(layer(input_NI), nn.Linear.forward(layer, input_NI))
