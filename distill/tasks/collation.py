"""Encoded examples -> padded tensors; padded -> packed batches.

B = examples, L = tokens of the longest, T = tokens of all examples.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.tasks.batch import Batch, PackedLayout


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


def pack(batch: Batch) -> Batch:
    """Drop the padding of a batch whose rows are positions; its examples then follow each other."""
    inputs, layout = pack_inputs(batch.inputs)
    positions = batch.positions
    if positions is not None:
        positions = torch.searchsorted(layout.slots_T, positions)
    return batch._replace(inputs=inputs, positions=positions, packed=layout, padded=False)


def pack_inputs(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], PackedLayout]:
    """Drop padding on the right, (B, L) -> (1, T); `position_ids` count in each example."""
    mask_BL = inputs["attention_mask"]
    slots_T = mask_BL.flatten().nonzero().flatten()
    packed = {name: column.flatten()[slots_T][None] for name, column in inputs.items()}
    packed["position_ids"] = (slots_T % mask_BL.shape[1])[None]
    return packed, PackedLayout(slots_T, (mask_BL.shape[0], mask_BL.shape[1]))


def _is_token(rows: list[Any]) -> np.ndarray:
    """Whether each position holds a token of the row and no padding, (B, L)."""
    lengths = np.array([len(row) for row in rows])
    return np.arange(lengths.max()) < lengths[:, None]
