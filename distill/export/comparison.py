"""Whether an exported model answers held-out texts as the trained student does: the student's own answers, and the comparison."""

from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from distill.data import columns_to_examples
from distill.models import logits
from distill.recipe.config import Data
from distill.tasks.base import Task
from distill.tasks.language import start_token

NEAR = 1e-4  # of the largest logit: predictions whose logits are this close are a tie


class NotComparableError(Exception):
    """The answers cannot even be compared; the message says why."""


class Comparison(NamedTuple):
    """How the export's answers compare with the student's: one row per text, or per token for language models."""

    rows: int
    agreement: float  # share of rows with the same prediction
    difference: float  # largest absolute difference of a logit
    scale: float  # largest absolute logit of the student


@torch.inference_mode()
def compare(
    task: Task, model: Any, tokenizer: Any, texts: Dataset, data: Data, told: list[dict[str, Any]]
) -> Comparison:
    """The trained student answers the texts the way it was trained to; `told` is what the export answered, by proof.py."""
    kinds = {"text-classification": _labels, "text-generation": _tokens}
    return kinds[task.pipeline](task, model, tokenizer, texts, data, told)


def _labels(
    task: Task, model: Any, tokenizer: Any, texts: Dataset, data: Data, told: list[dict[str, Any]]
) -> Comparison:
    """Logits by the name of their label, so that the order of the names is part of the proof."""
    names = list(task.names) or [
        model.config.id2label[place] for place in range(model.config.num_labels)
    ]
    if set(told[0]["logits"]) != set(names):
        raise NotComparableError(
            f"its labels are {', '.join(sorted(told[0]['logits']))}, and the student's are {', '.join(sorted(names))}"
        )
    student_NC = _trained(task, model, tokenizer, texts, data)
    export_NC = torch.tensor([[answer["logits"][name] for name in names] for answer in told])
    scale = float(student_NC.abs().max())
    agreement = float(
        task.agreement(export_NC, break_ties(student_NC, export_NC, NEAR * scale / 2)).mean()
    )
    return Comparison(len(told), agreement, float((export_NC - student_NC).abs().max()), scale)


def break_ties(student_NC: Tensor, export_NC: Tensor, near: float) -> Tensor:
    """The student's logits, each moved towards the export's by at most `near`: where that changes a prediction, it was a tie."""
    return export_NC.clamp(student_NC - near, student_NC + near)


def _trained(task: Task, model: Any, tokenizer: Any, texts: Dataset, data: Data) -> Tensor:
    batches = (
        task.collate([example], tokenizer.pad_token_id)
        for example in columns_to_examples(task.encode(texts[:], tokenizer, data))
    )
    return torch.cat(
        [
            logits(model, {key: value.to(model.device) for key, value in batch.inputs.items()})
            .float()
            .cpu()
            for batch in batches
        ]
    )


def _tokens(
    task: Task, model: Any, tokenizer: Any, texts: Dataset, data: Data, told: list[dict[str, Any]]
) -> Comparison:
    """At every token: the next one, its logit, and the normaliser of the distribution. Of prompts and completions, the prompts."""
    start, agreed, apart, scale = start_token(tokenizer), [], [], 0.0
    for text, answer in zip([text or "" for text in texts[data.text[0]]], told, strict=True):
        ids = [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]][
            : task.max_length
        ]
        if ids != answer["ids"]:
            raise NotComparableError(
                f"its tokenizer reads {text[:40]!r} as {answer['ids'][:8]}..., and the student's as {ids[:8]}..."
            )
        inputs_1L = torch.tensor([ids], device=model.device)
        logits_LV = (
            logits(model, {"input_ids": inputs_1L, "attention_mask": torch.ones_like(inputs_1L)})[0]
            .float()
            .cpu()
        )
        top_L, chosen_L = (
            logits_LV.amax(-1),
            logits_LV.gather(1, torch.tensor(answer["next"])[:, None])[:, 0],
        )
        scale = max(scale, float(logits_LV.abs().max()))
        agreed.append((top_L - chosen_L <= NEAR * scale).float())
        apart += [
            top_L - torch.tensor(answer["top"]),
            logits_LV.logsumexp(-1) - torch.tensor(answer["logsumexp"]),
        ]
    rows = torch.cat(agreed)
    return Comparison(len(rows), float(rows.mean()), float(torch.cat(apart).abs().max()), scale)
