"""Calls the functions of a task once on a few examples, before anything is trained.

Shapes: B = examples, L = tokens of the longest, N = rows, C = classes or vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.recipe import targets
from distill.tasks.base import Task
from distill.tasks.batch import Batch

__all__ = ["check_monitors", "try_task"]

_WIDTH = 11  # logits of a task that has no number of labels and no vocabulary


def try_task(task: Task, examples: list[dict[str, Any]], pad_id: int) -> list[str]:
    """Collate examples, select rows of random logits, compute the loss and the metrics.

    Args:
        task: bound to the labels of the data.
        examples: some encoded examples.
        pad_id: token of the padding.

    Returns:
        The names of its metrics.

    Raises:
        UserError: if a function raises, or the loss has another shape than (N,).
    """
    path = f"{type(task).__module__}.{type(task).__qualname__}"
    try:
        batch = task.collate(examples, pad_id)
        rows_NC = _rows(task, batch)
        loss_N = task.label_loss(rows_NC, batch.labels)
        if not isinstance(loss_N, Tensor) or loss_N.shape != rows_NC.shape[:1]:
            shape = tuple(loss_N.shape) if isinstance(loss_N, Tensor) else type(loss_N).__name__
            raise UserError(
                f"task is {path}, but for {len(rows_NC)} rows of logits its label_loss returned "
                f"{shape}: let it return one number for each row, ({len(rows_NC)},)"
            )
        return list(task.compute_metrics(task.outcomes(rows_NC, batch)))
    except UserError:
        raise
    except Exception as error:
        raise targets.user_error("task", path, error) from error


def _rows(task: Task, batch: Batch) -> Tensor:
    """Random rows of logits, (N, C), of a model of the task's kind."""
    ids = batch.inputs["input_ids"]
    width = task.model_kwargs().get("num_labels", max(_WIDTH, int(ids.max()) + 1))
    per_token = not task.auto_class.endswith("SequenceClassification")
    shape = (*ids.shape, width) if per_token else (len(ids), width)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return task.select_rows(logits, batch)


def check_monitors(callbacks: list[Any], metrics: list[str], parts: list[str]) -> None:
    """Check that the metrics which callbacks monitor are logged.

    Args:
        callbacks: the callbacks of a recipe.
        metrics: names of the task's metrics.
        parts: names of the parts of the loss.

    Raises:
        UserError: if one is not.
    """
    known = [f"val/{name}" for name in metrics] + [f"train/{name}" for name in parts]
    groups = {name.rpartition("/")[0] for name in known if name.count("/") > 1}
    for callback in callbacks:
        monitored = getattr(callback, "monitor", None)
        if not isinstance(monitored, str) or monitored in known:
            continue
        if monitored.rpartition("/")[0] not in groups:
            raise UserError(
                f"{type(callback).__name__} monitors {monitored}, but that is not logged: "
                f"{targets.did_you_mean(monitored, known)}"
            )
