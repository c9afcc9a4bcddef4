"""A narrow random model of a family, on which the structure of the family is examined.

It has the config of the full model, with all layers and heads, but widths and the vocabulary are
small. Its weights are random, in float64, and of a size that makes every part count.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.forward import forward_arguments
from distill.models.hub import silence_transformers

VOCABULARY = 64  # rows of the embedding of a tiny model
LENGTH = 6  # tokens of the input on which it is traced
_WIDE = 64  # integers of a config from this value on are widths, unless a word says otherwise
# Words in the keys of large integers that are no widths.
_NO_WIDTHS = (
    *("vocab", "position", "token", "window", "ctx", "num_", "span", "bucket", "distance"),
    *("theta", "_id", "seq", "length", "layers", "factor", "experts", "n_head"),
)
_MIN_HEAD = 4  # narrowest head


def tiny_config(config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """A narrow copy of a config, and the factor by which its widths are smaller."""
    small = copy.deepcopy(config)
    for key in {"compression", "quantization_config", "auto_map"} & vars(small).keys():
        delattr(small, key)
    factor = _common_factor(small)
    for key in _width_keys(small):
        setattr(small, key, getattr(small, key) // factor)
    if isinstance(getattr(small, "vocab_size", None), int):
        small.vocab_size = VOCABULARY
    _renumber_tokens(small)
    return small, factor


def tiny_model(
    config: PreTrainedConfig, seed: int = 0, attention: str = "eager"
) -> PreTrainedModel:
    """A model of a config of :func:`tiny_config`, without a head, whose every tensor is random.

    The global generators are left as they were.

    Raises:
        UserError: transformers cannot build it.
    """
    with torch.random.fork_rng(devices=[]), _errors_as_sentence(config), silence_transformers():
        # torch.manual_seed would also seed GPUs, whose generators are not restored.
        torch.default_generator.manual_seed(seed)
        model = AutoModel.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
                parameter.add_(torch.randn_like(parameter) / math.sqrt(fan_in))
        return model.eval()


def tiny_inputs(model: PreTrainedModel, length: int = LENGTH) -> dict[str, Any]:
    """One example without padding, as arguments of the model."""
    special = {model.config.pad_token_id, getattr(model.config, "eos_token_id", None)}
    tokens = [token for token in range(VOCABULARY - 1, 0, -1) if token not in special][:length]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    known = forward_arguments(model)
    if "use_cache" in known:
        inputs["use_cache"] = False
    return {name: value for name, value in inputs.items() if name in known}


@torch.no_grad()
def tiny_outputs(model: PreTrainedModel) -> Tensor:
    """The last hidden states of a tiny model."""
    return model(**tiny_inputs(model)).last_hidden_state


def _width_keys(config: PreTrainedConfig) -> list[str]:
    return [
        key
        for key, value in config.to_dict().items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and (value >= _WIDE or key in ("head_dim", "d_kv"))
        and not any(word in key for word in _NO_WIDTHS)
    ]


def _common_factor(config: PreTrainedConfig) -> int:
    """The largest power of two that divides the width and that of a head, and leaves heads wide."""
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(hidden, int)) or hidden < _WIDE:
        return 1
    values = config.to_dict()
    head = values.get("head_dim") or values.get("d_kv") or hidden // heads
    factor = math.gcd(hidden, head)
    factor &= -factor
    while factor > 1 and head // factor < _MIN_HEAD:
        factor //= 2
    return factor


def _renumber_tokens(config: PreTrainedConfig) -> None:
    """Give special tokens ids inside the small vocabulary; small ids, such as RoBERTa's 1, stay."""
    free = iter(range(VOCABULARY - 20, VOCABULARY))
    for key, value in vars(config).items():
        if not key.endswith("_token_id"):
            continue
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int):
            inside = 0 <= value < VOCABULARY - 20
            setattr(config, key, value if inside else next(free))


@contextmanager
def _errors_as_sentence(config: PreTrainedConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the architecture is {config.model_type}, but its structure cannot be examined, as "
            f"a small model of its config does not build ({type(error).__name__}: {reason}): "
            "leave out student.layers, loss.terms and techniques that remove parts"
        ) from error
