"""One pass of all models over the same examples: outcomes, and fidelity to the teacher.

N = rows of logits that count, C = classes or vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from distill import data, models
from distill.evaluate.inputs import ModelInputs
from distill.evaluate.records import Fidelity
from distill.tasks.base import Task
from distill.tasks.batch import Batch

Columns = dict[str, Tensor]  # outcomes of all examples by name, each (examples, ...)


def model_batches(
    task: Task, inputs: Mapping[str, ModelInputs], plan: data.BatchPlan
) -> Iterator[dict[str, Batch]]:
    """The batches of a plan for each model; models with the same inputs share a batch."""
    encoded: dict[int, data.EncodedDataset] = {
        id(source): data.EncodedDataset(source.examples, task, source.tokenizer.pad_token_id)
        for source in inputs.values()
    }
    for micro_batch in plan:
        batches = {key: examples[micro_batch] for key, examples in encoded.items()}
        yield {name: batches[id(source)] for name, source in inputs.items()}


@torch.inference_mode()
def collect_outcomes(
    task: Task, loaded: Mapping[str, Any], batches: Iterable[Mapping[str, Batch]]
) -> tuple[dict[str, Columns], dict[str, Fidelity]]:
    """Run the models on all batches.

    Args:
        task: Task of the models.
        loaded: Models by name, on one device: `student`, and perhaps `teacher` and others.
        batches: The same examples for each model by name.

    Returns:
        The outcomes of each model (see `Task.outcomes`), and the fidelity of the other models to
        the teacher, if there is one.
    """
    parts: dict[str, list[Columns]] = {name: [] for name in loaded}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [] for name in loaded if name != "teacher"
    }
    device = loaded["student"].device
    for batch in batches:
        moved = {name: move_data_to_device(inputs, device) for name, inputs in batch.items()}
        rows = {
            name: task.select_rows(models.logits(model, moved[name].inputs), moved[name]).float()
            for name, model in loaded.items()
        }
        for name, rows_NC in rows.items():
            outcomes = task.outcomes(rows_NC, moved[name])
            parts[name].append({key: column.cpu() for key, column in outcomes.items()})
        for name in pairs if "teacher" in rows else ():
            pair = _shared_classes(rows[name], rows["teacher"])
            pairs[name].append((task.agreement(*pair).cpu(), task.divergence(*pair).cpu()))
    columns = {
        name: {key: torch.cat([batch[key] for batch in outcomes]) for key in outcomes[0]}
        for name, outcomes in parts.items()
    }
    return columns, {name: _fidelity(rows) for name, rows in pairs.items() if rows}


def _fidelity(pairs: list[tuple[Tensor, Tensor]]) -> Fidelity:
    """Means over the rows of all batches."""
    agreement, divergence = (
        float(torch.cat(values).double().mean()) for values in zip(*pairs, strict=True)
    )
    return Fidelity(agreement, divergence)


def _shared_classes(student_NC: Tensor, teacher_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the classes that only the wider vocabulary has, because they are padding."""
    shared = min(student_NC.shape[1], teacher_NC.shape[1])
    return student_NC[:, :shared], teacher_NC[:, :shared]


def sum_by_text(columns: Columns, examples: Dataset, plan: data.BatchPlan) -> Columns:
    """Outcomes in the order of a plan, summed over the windows of each text.

    Windows of one text are correlated, so that resampling them would give too narrow intervals.
    """
    if "first_window" not in examples.column_names:
        return columns
    text_indices = np.cumsum(examples.with_format("numpy")["first_window"][:]) - 1
    index = torch.from_numpy(text_indices[[place for micro in plan for place in micro.indices]])
    return {
        name: torch.zeros(int(text_indices[-1]) + 1).double().index_add(0, index, column.double())
        for name, column in columns.items()
    }
