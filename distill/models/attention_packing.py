"""Attention of packed batches, in which the examples follow each other without padding.

Queries, keys and values are padded for the attention alone, so that each example attends to itself
only. Linear layers, norms and the head, which cost most, compute no padding. Where a model does not
take this attention, transformers builds a block-diagonal mask from the position ids.

T = tokens of all examples, B = examples, L = tokens of the longest, H = heads, D = width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill import internals
from distill.errors import UserError
from distill.models.forward import forward_arguments
from distill.models.tiny_models import LENGTH, tiny_config, tiny_inputs, tiny_model
from distill.tasks.batch import Batch, PackedLayout
from distill.tasks.collation import model_inputs, pack_inputs

PACKED = "packed_sdpa"  # name of this attention in transformers
_LENGTHS = (LENGTH, 1, 4, 3)  # of the examples in the proof
_WINDOW = 3  # of sliding and chunked attention in the proof
_TOLERANCE = 1e-3  # of states in float32; examples that see each other differ by 0.1 and more

_LAYOUT: ContextVar[PackedLayout | None] = ContextVar("layout", default=None)
_PROVEN: dict[tuple[str, str], str | None] = {}


class _PackedMask(NamedTuple):
    """What the attention function of a packed batch gets in place of a mask."""

    layout: PackedLayout
    mask: Tensor | None  # (1, 1, L, L), the same for all examples; None: causal


def _build_mask(batch_size: int, **options: Any) -> Any:
    """The mask of one padded example, which holds for all; without a layout, that of sdpa."""
    layout = _LAYOUT.get()
    if layout is None:
        return sdpa_mask(batch_size, **options)
    longest = layout.shape[1]
    sizes = {"q_length": longest, "kv_length": longest, "attention_mask": None}
    return _PackedMask(layout, sdpa_mask(1, **(options | sizes)))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of each example, (1, H, T, D) -> (1, T, H, D)."""
    if not isinstance(attention_mask, _PackedMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layout, mask = attention_mask
    query, key, value = (
        layout.pad(each[0].transpose(0, 1)).transpose(1, 2) for each in (query, key, value)
    )
    output_BLHD, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return layout.unpad(output_BLHD)[None], None


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, _build_mask)


@contextmanager
def packed_attention(*models: Any) -> Iterator[None]:
    """Give models the attention for packed batches inside the context.

    Raises:
        UserError: A model mixes the examples of a packed batch.
    """
    before: list[tuple[Any, Any]] = []
    try:
        for model in models:
            if isinstance(model, PreTrainedModel):
                attention = check_packing(model.config)
                before.append((model, internals.attention_implementation(model.config)))
                if attention is not None:
                    model.set_attn_implementation(attention)
        yield
    finally:
        for model, attention in reversed(before):  # the same model may be there twice
            model.set_attn_implementation(attention)


@contextmanager
def batch_inputs(model: PreTrainedModel, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """The arguments of a model's forward for a batch; it must be called inside the context."""
    packed: AbstractContextManager[dict[str, Tensor]] = nullcontext(batch.inputs)
    if batch.packed is not None:
        packed = packed_inputs(model, batch.inputs, batch.packed)
    padding = nullcontext() if batch.padded is None else internals.known_padding(batch.padded)
    with padding, packed as inputs:
        yield inputs


@contextmanager
def packed_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], layout: PackedLayout
) -> Iterator[dict[str, Tensor]]:
    """The arguments of a model's forward for a packed batch, inside the context."""
    if internals.attention_implementation(model.config) != PACKED:
        # Without a mask, transformers finds the examples by their position ids.
        yield {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
        return
    token = _LAYOUT.set(layout)
    try:
        yield inputs
    finally:
        _LAYOUT.reset(token)


def check_packing(config: PreTrainedConfig) -> str | None:
    """Prove on a tiny model that the examples of a packed batch do not affect each other.

    Args:
        config: Of a loaded model, which names its attention.

    Returns:
        The attention that the model needs for it; None: the one that it has.

    Raises:
        UserError: Neither keeps the examples apart.
    """
    small, _ = tiny_config(config)
    for name, value in vars(small).items():
        if ("window" in name or "chunk" in name) and type(value) is int and value > 1:
            setattr(small, name, _WINDOW)
    attention = internals.attention_implementation(config) or "eager"
    key = (attention, small.to_json_string(use_diff=False))
    if key not in _PROVEN:
        _PROVEN[key] = _fitting_attention(small, attention)
    fitting = _PROVEN[key]
    if fitting is None:
        raise UserError(
            f"data.packing is true, but a model of the architecture {config.model_type} cannot "
            "keep the examples of a packed batch apart: set data.packing=false"
        )
    return None if fitting == attention else fitting


def _fitting_attention(config: PreTrainedConfig, attention: str) -> str | None:
    """The first attention with which packed examples have the states of separate ones."""
    model = tiny_model(config).float()
    tokens = tiny_inputs(model, sum(_LENGTHS))["input_ids"][0].split(_LENGTHS)
    examples = [model_inputs([{"input_ids": ids}], pad_id=0) for ids in tokens]
    separate_TD = torch.cat([_last_states(model, example) for example in examples])
    padded = model_inputs([{"input_ids": ids} for ids in tokens], pad_id=0)
    for name in dict.fromkeys((PACKED, attention)):
        packed_TD = _packed_states(config, name, padded)
        if packed_TD is not None:
            difference = (packed_TD - separate_TD).abs().max() / separate_TD.abs().max()
            if difference <= _TOLERANCE:
                return name
    return None


def _packed_states(
    config: PreTrainedConfig, attention: str, padded: dict[str, Tensor]
) -> Tensor | None:
    """The states of a tiny model for a packed batch, (T, D); None if it does not take one."""
    inputs, layout = pack_inputs(padded)
    try:
        model = tiny_model(config, attention=attention).float()
        with packed_inputs(model, inputs, layout) as packed:
            return _last_states(model, packed)
    except (UserError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None


@torch.no_grad()
def _last_states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states of the only row."""
    known = forward_arguments(model)
    options = {"use_cache": False} if "use_cache" in known else {}
    inputs = {name: tensor for name, tensor in inputs.items() if name in known}
    states: Tensor = model(**inputs, **options).last_hidden_state
    return states[0]
