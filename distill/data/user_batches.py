"""Batches of a user's data loader -> batches as the tasks collate them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.errors import UserError
from distill.tasks.base import Task
from distill.tasks.batch import Batch

TOKEN_COLUMNS = ("input_ids", "token_type_ids")


def batch_from_columns(columns: Any, task: Task, pad_id: int) -> Batch:
    """Build a batch from the tensors that a collate function of transformers returns.

    Args:
        columns: `input_ids` and `labels`; optionally `attention_mask` and `token_type_ids`. Texts
            may be padded on either side.
        task: collates the examples again, so that positions and labels follow its conventions.
        pad_id: id of the padding token.

    Raises:
        UserError: if `columns` is not a mapping, or a column is missing.
    """
    if not isinstance(columns, Mapping):
        raise UserError(
            f"the batch is a {type(columns).__name__}, but it must map names to tensors: use a "
            "collate function such as transformers.DataCollatorWithPadding"
        )
    for name in ("input_ids", "labels"):
        if name not in columns:
            raise UserError(
                f"the batch has {', '.join(columns)}, but it must have {name}: let the data "
                "loader's collate function return it"
            )
    return task.collate(
        [_example(columns, row, task) for row in range(len(columns["labels"]))], pad_id
    )


def _example(columns: Mapping[str, Tensor], row: int, task: Task) -> dict[str, Any]:
    """One encoded example without its padding, as `Task.encode` describes it."""
    ids = columns["input_ids"][row]
    mask = columns["attention_mask"][row].bool() if "attention_mask" in columns else ids == ids
    example = {name: columns[name][row][mask].tolist() for name in TOKEN_COLUMNS if name in columns}
    labels = columns["labels"][row]
    example["labels"] = (labels[mask] if task.selects_positions else labels).tolist()
    return example | {"size": int(not task.selects_positions)}  # bytes of a text are unknown here
