"""One pass of all models over the same examples: outcomes, and fidelity to the teacher.

N = rows of logits that count, C = classes or vocabulary.
"""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from distill import data, models
from distill.evaluate.inputs import ModelInputs
from distill.evaluate.records import Fidelity
from distill.losses import chunked
from distill.losses.chunked import FactoredLogits, LogitRows
from distill.tasks.base import Task
from distill.tasks.batch import Batch, join_columns

Columns = dict[str, Tensor]  # outcomes of all examples by name, each (examples, ...)
Pair = tuple[Tensor, Tensor]  # agreement with the teacher and divergence from it, each (N,)

# Tokens whose hidden states are kept on the CPU while the models are on the device in turn.
GROUP_TOKENS = 1 << 17


def model_batches(
    task: Task, inputs: Mapping[str, ModelInputs], plan: data.BatchPlan
) -> Iterator[dict[str, Batch]]:
    """The batches of a plan for each model; models with the same inputs share a batch."""
    encoded: dict[int, data.EncodedDataset] = {
        id(source): data.EncodedDataset(
            source.examples, data.Collator(task, source.tokenizer.pad_token_id)
        )
        for source in inputs.values()
    }
    for micro_batch in plan:
        batches = {key: examples[micro_batch] for key, examples in encoded.items()}
        yield {name: batches[id(source)] for name, source in inputs.items()}


class _Outputs(NamedTuple):
    """The rows of all models for one batch, and the batch as each model reads it."""

    rows: dict[str, LogitRows]
    batch: Mapping[str, Batch]


@torch.no_grad()
def collect_outcomes(
    task: Task,
    loaded: Mapping[str, Any],
    batches: Iterable[Mapping[str, Batch]],
    device: str = "cpu",
    same_rows: bool = True,
) -> tuple[dict[str, Columns], dict[str, Fidelity]]:
    """Run the models on all batches.

    Logits of a large vocabulary are computed from hidden states, for some rows at a time.

    Args:
        task: Task of the models.
        loaded: Models by name, on the CPU: `student`, and perhaps `teacher` and others.
        batches: The same examples for each model by name.
        device: `cpu` or `cuda`.
        same_rows: Whether all models have the same rows; otherwise they are not compared.

    Returns:
        The outcomes of each model (see `Task.outcomes`), and the fidelity of the other models to
        the teacher, if there is one.
    """
    parts: dict[str, list[Columns]] = {name: [] for name in loaded}
    pairs: dict[str, list[Pair]] = {name: [] for name in loaded if name != "teacher"}
    for outputs in run_models(task, loaded, batches, device):
        groups = [outputs.rows] if same_rows else [{name: outputs.rows[name]} for name in loaded]
        compared = [compare_outputs(task, rows, outputs.batch) for rows in groups]
        outcomes, fidelity = (dict(ChainMap(*each)) for each in zip(*compared, strict=True))
        for name, columns in outcomes.items():
            parts[name].append(columns)
        for name, pair in fidelity.items():
            pairs[name].append(pair)
    outcomes_of = {
        name: {key: column.cpu() for key, column in join_columns(outcomes).items()}
        for name, outcomes in parts.items()
    }
    return outcomes_of, {name: _fidelity(rows) for name, rows in pairs.items() if rows}


def run_models(
    task: Task, loaded: Mapping[str, Any], batches: Iterable[Mapping[str, Batch]], device: str
) -> Iterator[_Outputs]:
    """The rows of all models for each batch.

    Where not all models fit on the device, each is there in turn, for a group of batches.
    """
    factors = {
        name: task.selects_positions and models.has_linear_head(model)
        for name, model in loaded.items()
    }
    if fits_device(loaded.values(), device):
        with models.on_device(device, *loaded.values()):
            for batch in batches:
                moved = _move(batch, device)
                yield _Outputs(
                    {
                        name: forward_rows(task, model, moved[name], factors[name])
                        for name, model in loaded.items()
                    },
                    moved,
                )
        return
    heads = {
        name: [None if tensor is None else tensor.to(device) for tensor in _head(model)]
        for name, model in loaded.items()
        if factors[name]
    }
    for group in _groups(batches):
        outputs: list[dict[str, LogitRows]] = [{} for _ in group]
        for name, model in loaded.items():
            with models.on_device(device, model):
                for rows, batch in zip(outputs, group, strict=True):
                    moved = move_data_to_device(batch[name], device)
                    rows[name] = _to(forward_rows(task, model, moved, factors[name]), "cpu")
        for rows, batch in zip(outputs, group, strict=True):
            yield _Outputs(
                {name: _to(part, device, heads.get(name)) for name, part in rows.items()},
                _move(batch, device),
            )


def _head(model: Any) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, head.bias


def _move(batch: Mapping[str, Batch], device: str) -> dict[str, Batch]:
    return {name: move_data_to_device(inputs, device) for name, inputs in batch.items()}


def _to(rows: LogitRows, device: str, head: list[Tensor | None] | None = None) -> LogitRows:
    """Rows on another device; of factors, only the hidden states unless a head is given."""
    if isinstance(rows, Tensor):
        return rows.to(device)
    moved = rows._replace(hidden_ND=rows.hidden_ND.to(device))
    if head is None:
        return moved
    weight_VD, bias_V = head
    assert weight_VD is not None
    return FactoredLogits(moved.hidden_ND, weight_VD, bias_V)


def _groups(batches: Iterable[Mapping[str, Batch]]) -> Iterator[list[Mapping[str, Batch]]]:
    """Consecutive batches of about GROUP_TOKENS tokens, whose hidden states are kept."""
    group: list[Mapping[str, Batch]] = []
    tokens = 0
    for batch in batches:
        group.append(batch)
        tokens += batch["student"].inputs["input_ids"].numel()
        if tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def fits_device(loaded: Iterable[Any], device: str) -> bool:
    """Whether the models fill at most half of the device's free memory."""
    if device == "cpu":
        return True
    size = sum(
        tensor.numel() * tensor.element_size()
        for model in loaded
        for tensor in (*model.parameters(), *model.buffers())
    )
    return size <= torch.cuda.mem_get_info()[0] / 2


@torch.inference_mode()
def forward_rows(task: Task, model: Any, batch: Batch, factors: bool) -> LogitRows:
    """The rows of a model that count, or their factors for a large vocabulary."""
    return models.evaluated_rows(
        model, batch.inputs, lambda outputs: task.select_rows(outputs, batch), factors
    )


def compare_outputs(
    task: Task, rows: Mapping[str, LogitRows], batch: Mapping[str, Batch]
) -> tuple[dict[str, Columns], dict[str, Pair]]:
    """The outcomes of each model, and agreement and divergence of the others with the teacher."""
    if not task.has_row_outcomes():  # the outcomes need all rows
        full = {name: chunked.full_logits(part).float() for name, part in rows.items()}
        outcomes = {name: task.outcomes(logits, batch[name]) for name, logits in full.items()}
        return outcomes, _pairs(task, full)
    columns: dict[str, list[Columns]] = {name: [] for name in rows}
    pairs: dict[str, list[Pair]] = {name: [] for name in rows if name != "teacher"}
    for part, logits in chunked.rows_in_chunks(*rows.values()):
        chunk = dict(zip(rows, (tensor.float() for tensor in logits), strict=True))
        for name, logits_nC in chunk.items():
            columns[name].append(task.row_outcomes(logits_nC, batch[name].labels[part]))
        for name, pair in _pairs(task, chunk).items():
            pairs[name].append(pair)
    return {
        name: task.sum_outcomes(join_columns(parts), batch[name]) for name, parts in columns.items()
    }, {name: (_cat(pair, 0), _cat(pair, 1)) for name, pair in pairs.items() if pair}


def _cat(pairs: list[Pair], place: int) -> Tensor:
    return torch.cat([pair[place] for pair in pairs])


def _pairs(task: Task, logits: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Agreement and divergence with the teacher of each other model; empty without a teacher."""
    if "teacher" not in logits:
        return {}
    shared = {
        name: _shared_classes(logits_NC, logits["teacher"])
        for name, logits_NC in logits.items()
        if name != "teacher"
    }
    return {name: (task.agreement(*both), task.divergence(*both)) for name, both in shared.items()}


def _fidelity(pairs: list[Pair]) -> Fidelity:
    """Means over the rows of all batches."""
    agreement, divergence = (
        float(torch.cat(values).cpu().double().mean()) for values in zip(*pairs, strict=True)
    )
    return Fidelity(agreement, divergence)


def _shared_classes(student_NC: Tensor, teacher_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the classes that only the wider vocabulary has, because they are padding."""
    shared = min(student_NC.shape[1], teacher_NC.shape[1])
    return student_NC[:, :shared], teacher_NC[:, :shared]


def have_same_rows(task: Task, inputs: Mapping[str, ModelInputs]) -> bool:
    """Whether the rows of all models are predictions of the same things.

    Models that predict tokens of different tokenizers have others, even if as many.
    """
    first, *others = inputs.values()
    return not task.predicts_tokens or all(
        other.tokenizer.get_vocab() == first.tokenizer.get_vocab() for other in others
    )


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
