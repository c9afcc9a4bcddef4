"""Inputs -> logits, or what a language model's head makes them of, whatever the model takes, on the device that the recipe allows."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill.losses.chunked import FactoredLogits
from distill.recipe.config import Run, Trainer


def resolve_device(run: Run) -> str:
    """Where models answer outside of the Trainer."""
    return "cuda" if run.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def supports_bf16(trainer: Trainer) -> bool:
    """Whether the device that the recipe allows has units for bfloat16."""
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def resolve_teacher_dtype(run: Run) -> str:
    """What the teacher answers in: `auto` -> bfloat16 where the device has units for it, else float32."""
    if run.teacher is None or run.teacher.dtype == "auto":
        return "bfloat16" if supports_bf16(run.trainer) else "float32"
    return run.teacher.dtype


@contextmanager
def on_device(device: str, *models: Any) -> Iterator[None]:
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
    known = forward_arguments(model)
    options = {"use_cache": False} if "use_cache" in known else {}
    return model(
        **{name: tensor for name, tensor in inputs.items() if name in known}, **options
    ).logits


def logit_rows(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    pick: Callable[[Tensor], Tensor],
    classes: int | None,
    factors: bool,
) -> FactoredLogits | Tensor:
    """The rows that `pick` takes of a model's places: the first `classes` logits of each, (N, C).

    `factors`: as hidden states and head, of which they are the product, where the head is an ordinary linear layer at this moment.
    """
    head: Any = model.get_output_embeddings() if factors else None
    if type(head) is not nn.Linear or isinstance(
        head.weight, DTensor
    ):  # it quantizes its weight, or is split over the ranks
        return pick(logits(model, inputs))[:, :classes]
    return factored_logits(head_inputs(model, inputs, pick), head, classes)


def head_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], pick: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rows that `pick` takes of what a language model's head reads, (N, D)."""
    with _answering(model.get_output_embeddings(), lambda head_inputs: head_inputs):
        return pick(logits(model, inputs))


def factored_logits(states_ND: Tensor, head: nn.Linear, classes: int | None) -> FactoredLogits:
    """Hidden states with the part of a head that makes the first `classes` logits."""
    if classes is None or classes == head.out_features:
        return FactoredLogits(states_ND, head.weight, head.bias)
    return FactoredLogits(
        states_ND, head.weight[:classes], None if head.bias is None else head.bias[:classes]
    )


@torch.no_grad()
def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether the logits are what the linear head answers: no cap, no scale, nothing comes after it. In evaluation mode."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    spread_V = torch.linspace(
        -1e3, 1e3, head.out_features, device=model.device
    )  # what a head might say
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with _answering(head, lambda head_inputs: spread_V.repeat(*head_inputs.shape[:-1], 1)):
        answered = logits(model, {"input_ids": token, "attention_mask": token})
    return torch.equal(answered.flatten(), spread_V)


@contextmanager
def _answering(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module answers with this function; its hooks see that."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of what its forward takes."""
    return _parameters(type(model).forward)


@lru_cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
