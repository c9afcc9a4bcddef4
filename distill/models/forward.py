"""A batch -> logits, or the hidden states that a language model's head turns into logits.

B = examples, L = tokens of the longest, C = classes or vocabulary, V = vocabulary, D = width,
N = selected rows.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill import internals
from distill.losses.chunked import FactoredLogits
from distill.recipe.config import Teacher, Trainer


def resolve_device(trainer: Trainer) -> str:
    """The device for models outside of Lightning's Trainer, `cuda` or `cpu`."""
    return "cuda" if trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def supports_bf16(trainer: Trainer) -> bool:
    """Whether the device of the recipe has instructions for bfloat16."""
    if resolve_device(trainer) == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return internals.cpu_supports_bf16()


def resolve_teacher_dtype(teacher: Teacher | None, trainer: Trainer) -> str:
    """The dtype of the teacher's forward; `auto` is bfloat16 if the device supports it."""
    if teacher is None or teacher.dtype == "auto":
        return "bfloat16" if supports_bf16(trainer) else "float32"
    return teacher.dtype


@contextmanager
def on_device(device: str, *models: Any) -> Iterator[None]:
    """Move models to a device inside the context, and back to the CPU afterwards.

    Not for use under `torch.inference_mode`, whose tensors cannot be trained.
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
    """The model's logits, (B, C) or (B, L, C); inputs unknown to its forward are dropped."""
    known = forward_arguments(model)
    options = {"use_cache": False} if "use_cache" in known else {}
    return model(
        **{name: tensor for name, tensor in inputs.items() if name in known}, **options
    ).logits


def logit_rows(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    select: Callable[[Tensor], Tensor],
    classes: int | None,
    factors: bool,
) -> FactoredLogits | Tensor:
    """Rows of a model's logits.

    Args:
        model: The model.
        inputs: Arguments of its forward.
        select: Selects rows of logits, or of hidden states, from those of all positions.
        classes: Number of leading columns to return; None returns all.
        factors: Whether to return hidden states and the head's weight, whose product are the
            logits. Ignored if the head is not a plain nn.Linear, or is sharded.

    Returns:
        Logits, (N, classes), or their factors.
    """
    head: Any = model.get_output_embeddings() if factors else None
    if type(head) is not nn.Linear or isinstance(head.weight, DTensor):
        return select(logits(model, inputs))[:, :classes]
    return factored_logits(head_inputs(model, inputs, select), head, classes)


def head_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], select: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows of the input of a language model's head, (N, D)."""
    with _replace_forward(model.get_output_embeddings(), lambda states: states):
        return select(logits(model, inputs))


def factored_logits(states_ND: Tensor, head: nn.Linear, classes: int | None) -> FactoredLogits:
    """Hidden states, with the rows of the head that compute the first `classes` logits."""
    if classes is None or classes == head.out_features:
        return FactoredLogits(states_ND, head.weight, head.bias)
    return FactoredLogits(
        states_ND, head.weight[:classes], None if head.bias is None else head.bias[:classes]
    )


@torch.no_grad()
def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output of a linear head, not soft-capped or scaled afterwards.

    The model must be in eval mode.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    probe_V = torch.linspace(-1e3, 1e3, head.out_features, device=model.device)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with _replace_forward(head, lambda states: probe_V.repeat(*states.shape[:-1], 1)):
        result = logits(model, {"input_ids": token, "attention_mask": token})
    return torch.equal(result.flatten(), probe_V)


@contextmanager
def _replace_forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward inside the context; its hooks still run."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of a model's forward."""
    return _parameters(type(model).forward)


@lru_cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
