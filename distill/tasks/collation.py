"""Encoded examples -> padded tensors.

B = examples, L = tokens of the longest.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def pad_column(examples: list[dict[str, Any]], column: str, value: int) -> Tensor:
    """One column of token ids, padded with `value` on the right, (B, L)."""
    rows = [np.asarray(example[column], np.int64) for example in examples]
    padded = np.full((len(rows), max(map(len, rows))), value)
    padded[_is_token(rows)] = np.concatenate(rows)
    return torch.from_numpy(padded)


def model_inputs(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Arguments of a model's forward, each (B, L): input_ids, attention_mask, token_type_ids.

    Token types are returned for pairs only: those of single texts are 0, the default of all models.
    """
    mask_BL = _is_token([example["input_ids"] for example in examples]).astype(np.int64)
    inputs = {
        "input_ids": pad_column(examples, "input_ids", pad_id),
        "attention_mask": torch.from_numpy(mask_BL),
    }
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = pad_column(examples, "token_type_ids", 0)
    return inputs


def _is_token(rows: list[Any]) -> np.ndarray:
    """Whether each position holds a token of the row and no padding, (B, L)."""
    lengths = np.array([len(row) for row in rows])
    return np.arange(lengths.max()) < lengths[:, None]
