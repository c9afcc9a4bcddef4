"""Inputs -> logits, whatever the model takes, on the device that the recipe allows."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import Run


def device_of(run: Run) -> str:
    """Where models answer outside of the Trainer."""
    return "cuda" if run.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def on(device: str, *models: Any) -> Iterator[None]:
    """The models are on that device inside, and on the CPU afterwards; the device's memory is then given back.

    Never under `torch.inference_mode`, which would make their moved parameters unfit for training.
    """
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model in models:
            model.to("cpu")
        if device == "cuda":
            torch.cuda.empty_cache()


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits, (B, C) or (B, L, C). Inputs that it does not know (token types, for DistilBERT) are left out."""
    known = _parameters(type(model).forward)
    options = {"use_cache": False} if "use_cache" in known else {}
    return model(**{name: tensor for name, tensor in inputs.items() if name in known}, **options).logits


@lru_cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
