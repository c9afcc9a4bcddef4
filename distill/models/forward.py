"""A batch -> logits, or the hidden states that a language model's head turns into logits.

B = examples, L = tokens of the longest, C = classes or vocabulary, V = vocabulary, D = width,
N = selected rows.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill import internals
from distill.errors import UserError
from distill.losses.chunk_sizes import chunk_bytes
from distill.losses.chunked import FactoredLogits
from distill.losses.products import LOW_PRECISION, autocast_dtype, linear_float32
from distill.recipe.config import Teacher, Trainer

NEW_NAME = "activation_checkpointing_enable"


def resolve_device(trainer: Trainer) -> str:
    """The device for models outside of Lightning's Trainer, `cuda` or `cpu`."""
    return "cuda" if trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def supports_bf16(trainer: Trainer) -> bool:
    """Whether the device of the recipe has instructions for bfloat16."""
    if resolve_device(trainer) == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return internals.cpu_supports_bf16()


def resolve_teacher_dtype(teacher: Teacher | None, trainer: Trainer) -> str:
    """The dtype of the teacher's forward; `auto` is bfloat16 if the device supports it.

    The base of a student computes as the student does, which is in float32.
    """
    if teacher is not None and teacher.outputs == "base":
        return "float32"
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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode inside the context, then restore each module's training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        Logits, (N, classes), or their factors. Logits of a head that is a plain nn.Linear are
        float32 also where it multiplies in lower precision.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return select(logits(model, inputs))[:, :classes]
    if factors and not isinstance(head.weight, DTensor):
        return factored_logits(head_inputs(model, inputs, select), head, classes)
    if autocast_dtype(head.weight) not in LOW_PRECISION:
        return select(logits(model, inputs))[:, :classes]
    # The weight is read inside, because a sharded one is complete only there.
    with replace_forward(head, lambda states: linear_float32(states, head.weight, head.bias)):
        return select(logits(model, inputs))[:, :classes]


def evaluated_rows(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    select: Callable[[Tensor], Tensor],
    factors: bool,
) -> FactoredLogits | Tensor:
    """Rows of a model's logits outside of training; see :func:`logit_rows`.

    Factors are returned where the logits of all positions would take more than a chunk, since the
    device must not hold (B, L, V) for a large vocabulary, and where the model would round them to
    low precision.
    """
    all_logits = 4 * inputs["input_ids"].numel() * _head_width(model) if factors else 0
    factored = all_logits > chunk_bytes(model.device) or (factors and model.dtype.itemsize < 4)
    return logit_rows(model, inputs, select, None, factored)


def _head_width(model: PreTrainedModel) -> int:
    """The number of logits of a position; 0 if the model has no linear head."""
    return getattr(model.get_output_embeddings(), "out_features", 0)


def head_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], select: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows of the input of a language model's head, (N, D)."""
    with replace_forward(model.get_output_embeddings(), lambda states: states):
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
    with replace_forward(head, lambda states: probe_V.repeat(*states.shape[:-1], 1)):
        result = logits(model, {"input_ids": token, "attention_mask": token})
    return torch.equal(result.flatten(), probe_V)


@contextmanager
def replace_forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward inside the context; its hooks still run."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def set_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Make blocks compute their activations again for the gradients, or keep them.

    Raises:
        UserError: The model cannot compute them again.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"student.gradient_checkpointing is true, but {type(model).__name__} has no blocks "
            "that support it: leave it out"
        )
    # Earlier versions of transformers have only the second name, later ones deprecate it.
    name = "activation_checkpointing" if hasattr(model, NEW_NAME) else "gradient_checkpointing"
    if enabled:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()


_ARGUMENTS: dict[type, frozenset[str]] = {}  # a compiler can follow it, unlike `lru_cache`


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of a model's forward."""
    if type(model) not in _ARGUMENTS:
        _ARGUMENTS[type(model)] = frozenset(inspect.signature(type(model).forward).parameters)
    return _ARGUMENTS[type(model)]
