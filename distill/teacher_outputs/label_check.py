"""A teacher's outputs compared with the labels, before a student learns from them.

A teacher that is significantly worse than chance, or better with its classes in another order, is
refused: its classes, or the sign or scale of its numbers, are not those of the data.

N = examples, C = classes.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from distill.data import labelled_rows, teacher_columns
from distill.errors import UserError
from distill.tasks.base import Task
from distill.tasks.batch import Batch
from distill.tasks.labels import shorten
from distill.teacher_outputs import class_order

log = logging.getLogger(__name__)
MAX_ROWS = 4096  # rows that are compared
MAX_CELLS = MAX_ROWS * 1000  # of these rows, classes: of more classes, fewer rows
MAX_FORWARD = 512  # of examples that the teacher still has to run on
MAX_EXCESS = 1.0  # nats per token above a uniform distribution's, for a language model

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """Where a teacher comes from, which decides what can be done about its classes."""

    is_trained: bool  # a random one only gets a warning
    is_fine_tuned: bool = False
    has_names: bool = False  # whether its classes have names of its own

    def way_out(self, order: list[str]) -> str:
        """How to correct a teacher whose classes are those of the data in this order."""
        if self.is_fine_tuned:
            return "raise teacher.finetune.epochs"
        tuned = "fine-tune it with teacher.finetune"
        if not order:
            return tuned
        if self.has_names:
            return f"correct id2label in its config.json, or {tuned}"
        return f"set data.labels to [{', '.join(order)}], or {tuned}"


def choose_examples(split: Dataset, task: Task) -> np.ndarray:
    """Indices of labelled examples, evenly spread over a split of encoded examples."""
    labelled = labelled_rows(split, task)
    rows = np.asarray(split.with_format("numpy")["rows"][:])[labelled]
    most = MAX_ROWS if teacher_columns.LOGITS in split.column_names else MAX_FORWARD
    if len(rows):
        most = min(most, max(1, int(MAX_ROWS // rows.mean())))
    spread = np.linspace(0, len(labelled) - 1, min(most, len(labelled)))
    return labelled[np.unique(spread.round().astype(int))]


@torch.inference_mode()
def check_labels(
    task: Task, batches: Iterable[Batch], logits: Callable[[Batch], Tensor], origin: Origin
) -> dict[str, float]:
    """Measure a teacher on labelled examples, and compare it with chance.

    Args:
        task: Bound to the labels.
        batches: Batches of the examples.
        logits: A batch -> the teacher's rows, (N, C).
        origin: Where the teacher comes from.

    Returns:
        The metrics.

    Raises:
        UserError: The teacher is worse than chance, or better in another order of its classes.
    """
    predictions: list[_Rows] = []
    outcomes: list[Columns] = []
    for batch in batches:
        rows_NC = logits(batch).float()
        batch = move_data_to_device(batch, rows_NC.device)  # those of a large head are on the CPU
        outcomes.append(
            {key: tensor.cpu() for key, tensor in task.outcomes(rows_NC, batch).items()}
        )
        classes = rows_NC.shape[1]
        if not task.predicts_tokens:
            predictions.append(_Rows(batch._replace(labels=batch.labels.cpu()), rows_NC.cpu()))
    metrics = task.compute_metrics(_concatenate(outcomes))
    count = sum(len(next(iter(columns.values()))) for columns in outcomes)
    log.info(
        "the teacher's %s is %.4g on %d labelled examples",
        *(task.primary_metric, metrics[task.primary_metric], count),
    )
    if task.predicts_tokens:
        _check_tokens(metrics, classes, origin)
    else:
        _check_predictions(task, predictions, metrics[task.primary_metric], origin)
    return metrics


class _Rows(NamedTuple):
    batch: Batch
    logits_NC: Tensor


def _concatenate(outcomes: list[Columns]) -> Columns:
    return {key: torch.cat([columns[key] for columns in outcomes]) for key in outcomes[0]}


def _check_tokens(metrics: dict[str, float], classes: int, origin: Origin) -> None:
    """Refuse a language model that is confidently wrong; warn of one that knows nothing."""
    nll, uniform = metrics["nll"], math.log(classes)
    if nll > uniform + MAX_EXCESS and origin.is_trained:
        raise UserError(
            f"the teacher's loss is {nll:.2f} nats per token, but predictions that know nothing "
            f"have {uniform:.2f}: its token ids are not those of the tokenizer, take the tokenizer "
            "that it was trained with"
        )
    if nll >= uniform:
        _warn("perplexity", metrics["perplexity"])


def _check_predictions(task: Task, predictions: list[_Rows], value: float, origin: Origin) -> None:
    cells = sum(rows.logits_NC.numel() for rows in predictions)
    step = max(1, -(-cells // MAX_CELLS))  # of many classes, some of the rows
    logits_NC = torch.cat([rows.logits_NC for rows in predictions])[::step]
    labels = torch.cat([rows.batch.labels for rows in predictions])[::step]
    indicators = task.class_indicators(logits_NC, labels)
    if indicators is None or not logits_NC.isfinite().all():
        return
    if indicators[0].shape[1] == 1:
        predicted_N, labels_N = (each[:, 0] for each in indicators)
        agreement = _check_numbers(predicted_N, labels_N, task, value, origin)
    else:
        agreement = class_order.class_agreement(*indicators)
        _check_order(task, predictions, agreement, value, origin)
    if not agreement.above_chance:
        _warn(task.primary_metric, value)


def _warn(metric: str, value: float) -> None:
    log.warning(
        "the teacher's %s, %.4g, is not significantly better than chance: "
        "a student can hardly learn from it",
        metric,
        value,
    )


def _check_order(
    task: Task,
    predictions: list[_Rows],
    agreement: class_order.Agreement,
    value: float,
    origin: Origin,
) -> None:
    """Refuse a teacher whose classes have another order, or that is worse than chance."""
    if not origin.is_trained or not (agreement.reordered or agreement.below_chance):
        return
    order, metric = list(agreement.order), task.primary_metric
    value_is = f"the teacher's {metric} is {value:.4g} on labelled examples, but "
    inverse = np.argsort(order)
    columns = [task.outcomes(rows.logits_NC[:, inverse], rows.batch) for rows in predictions]
    reordered = task.compute_metrics(_concatenate(columns))[metric]
    if not (reordered > value if task.maximize else reordered < value):
        if agreement.below_chance:
            raise UserError(
                f"{value_is}that is worse than chance: take a teacher of the same classes, or "
                f"{origin.way_out([])}"
            )
        return
    names = [*task.names] or [str(place) for place in range(len(order))]
    moved = [place for place, target in enumerate(order) if place != target]
    before, after = (
        shorten(names[place] for place in places)
        for places in (moved, [order[place] for place in moved])
    )
    raise UserError(
        f"{value_is}{reordered:.4g} if its classes {before} are read as {after}: "
        f"{origin.way_out([names[target] for target in order])}"
    )


def _check_numbers(
    predicted_N: Tensor, labels_N: Tensor, task: Task, value: float, origin: Origin
) -> class_order.Agreement:
    """Refuse a regressor whose numbers fall where labels rise, or are on another scale."""
    agreement = class_order.number_agreement(predicted_N, labels_N)
    if agreement.below_chance and origin.is_trained:
        raise UserError(
            f"the teacher's {task.primary_metric} is {value:.4g} on labelled examples, but its "
            "numbers must rise with the labels: reverse the labels of the data, or "
            f"{origin.way_out([])}"
        )
    off_scale = class_order.is_off_scale(predicted_N, labels_N)
    if agreement.above_chance and off_scale and origin.is_trained and not origin.is_fine_tuned:
        slope = float(torch.cov(torch.stack([predicted_N, labels_N]))[0, 1] / predicted_N.var())
        offset = float(labels_N.mean() - slope * predicted_N.mean())
        raise UserError(
            f"the teacher's numbers are {predicted_N.mean():.3g} on average on labelled examples, "
            f"but the labels are {labels_N.mean():.3g}, which they fit as "
            f"{offset:.3g} + {slope:.3g} x: bring the labels to the teacher's scale, or "
            f"{origin.way_out([])}"
        )
    return agreement
