"""Inputs -> logits, whatever the model takes."""

import inspect
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor
from transformers import PreTrainedModel


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits, (B, C) or (B, L, C). Inputs that it does not know (token types, for DistilBERT) are left out."""
    known = _parameters(type(model).forward)
    options = {"use_cache": False} if "use_cache" in known else {}
    return model(**{name: tensor for name, tensor in inputs.items() if name in known}, **options).logits


@lru_cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
