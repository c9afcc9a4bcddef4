"""Tokens with which a decoder starts and that end a text, for models built from a config."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def set_decoder_tokens(
    config: PreTrainedConfig, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Set the token with which a decoder starts and that which ends a text, unless the recipe does.

    A decoder starts with the padding token where the family has no default (T5), else with the end
    of a text (BART), which is the token that the tokenizer puts there: a classifier reads it.
    """
    if not config.is_encoder_decoder:
        return
    last = None if tokenizer is None else tokenizer("a")["input_ids"][-1]
    if last in getattr(tokenizer, "all_special_ids", ()) and "eos_token_id" not in options:
        config.eos_token_id = last
    if "decoder_start_token_id" not in options:
        family_default = getattr(type(config)(), "decoder_start_token_id", None)
        eos_id = getattr(config, "eos_token_id", None)
        start = config.pad_token_id if family_default is None or eos_id is None else eos_id
        config.decoder_start_token_id = start
