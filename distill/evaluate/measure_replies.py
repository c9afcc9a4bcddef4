"""What language models write: replies to the same prompts, and their fidelity to the teacher."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple

from datasets import Dataset

from distill import data, losses, models
from distill.evaluate import quality
from distill.evaluate.cost import Inputs, TimedInputs, measure_generation_costs
from distill.evaluate.inputs import ModelInputs, evenly_spaced
from distill.evaluate.outcomes import collect_outcomes, model_batches
from distill.evaluate.record_parts import Generation, Interval, Replies
from distill.evaluate.replies import Tokens, distinct, write_replies
from distill.evaluate.reply_scores import score_replies
from distill.evaluate.settings import MeasureSettings
from distill.models.sampling import left_padded
from distill.recipe import config
from distill.tasks.base import Task

log = logging.getLogger("distill")

SHOWN = 10  # replies in metrics.json and in the report
TIMED, TIMED_BATCHES = 10, 3  # generations of each model, of one prompt and of a batch of them


class PromptSet(NamedTuple):
    """The prompts of all models, in the same order."""

    tokens: dict[str, list[Tokens]]  # by model, as its tokenizer encodes them
    new_tokens: int  # tokens of a reply, at most
    references: list[str]  # the replies in the data, some may be empty; no entries without any

    def timed(self, settings: config.Evaluate) -> dict[str, TimedInputs]:
        """Inputs of timed generations of each model: single prompts, and full batches."""
        return {
            name: TimedInputs(
                [_inputs([prompts[place]]) for place in evenly_spaced(len(prompts), TIMED)],
                [_inputs(prompts[: settings.batch_size])] * TIMED_BATCHES,
            )
            for name, prompts in self.tokens.items()
        }


class ReplyMeasurement(NamedTuple):
    """What the models of a run reply."""

    prompts: PromptSet
    models: dict[str, Generation]  # by name, without costs
    replies: Replies

    def with_costs(
        self, request: dict[str, Any], settings: config.Evaluate
    ) -> dict[str, Generation]:
        """The records of the models with what generation costs, see `measure_generation_costs`."""
        timed = self.prompts.timed(settings)
        costs = measure_generation_costs(request, timed, self.prompts.new_tokens)
        return {name: replace(record, **costs[name]) for name, record in self.models.items()}


class Written(NamedTuple):
    """The replies of one model to its prompts."""

    prompts: list[Tokens]
    replies: list[Tokens]
    stop: Tokens


def encode_prompts(
    task: Any,
    inputs: Mapping[str, ModelInputs],
    raw: Dataset,
    settings: config.Data,
    measured: config.Evaluate,
) -> PromptSet:
    """Prompts from texts that are spread evenly over a split, which leave room for a reply.

    Args:
        task: A task that generates.
        inputs: The tokenizer of each model.
        raw: The raw split.
        settings: The recipe's section `data`.
        measured: The recipe's section `evaluate`.
    """
    new_tokens = min(measured.max_new_tokens, task.max_length // 2)
    rows = raw[evenly_spaced(len(raw), measured.requests)]
    room = task.max_length - new_tokens
    encoded = {
        name: task.encode_prompts(rows, source.tokenizer, settings, room)
        for name, source in inputs.items()
    }
    filled = [all(row) for row in zip(*encoded.values(), strict=True)]
    return PromptSet(
        {name: list(compress(prompts, filled)) for name, prompts in encoded.items()},
        new_tokens,
        list(compress(task.reference_replies(rows, settings), filled)),
    )


def measure_replies(
    task: Task,
    loaded: Mapping[str, Any],
    inputs: Mapping[str, ModelInputs],
    raw: Dataset,
    settings: MeasureSettings,
    device: str,
) -> ReplyMeasurement | None:
    """Let each model reply to the same prompts, and compare the others with the teacher.

    Args:
        task: Task of the models, which generate.
        loaded: Models by name, on the CPU.
        inputs: The tokenizer of each model.
        raw: The raw split, whose texts are the prompts.
        settings: How models are measured.
        device: `cpu` or `cuda`.

    Returns:
        None if there is no prompt.
    """
    size = settings.evaluate.batch_size
    prompts = encode_prompts(task, inputs, raw, settings.data, settings.evaluate)
    if not prompts.tokens["student"]:
        log.warning("generation is not measured: all prompts are empty")
        return None
    written = {
        name: _write(model, inputs[name], prompts.tokens[name], prompts.new_tokens, size, device)
        for name, model in loaded.items()
    }
    records = {
        name: replace(
            _describe(each),
            scores=_scores(inputs[name], each, prompts.references, settings),
        )
        for name, each in written.items()
    }
    for name, model in loaded.items():
        if name == "teacher" or "teacher" not in loaded or _differ(inputs, name):
            continue
        pair = {"student": model, "teacher": loaded["teacher"]}
        fidelity = _fidelity(task, pair, inputs[name], written[name], size, device)
        records[name] = replace(records[name], **fidelity)
    count = len(written["student"].replies)
    shown = _examples(written, inputs, prompts.references)
    replies = Replies(count, prompts.new_tokens, min(size, count), shown)
    return ReplyMeasurement(prompts, records, replies)


def _inputs(prompts: Sequence[Tokens]) -> Inputs:
    ids_BL, mask_BL = left_padded(prompts)
    return {"input_ids": ids_BL.tolist(), "attention_mask": mask_BL.tolist()}


def _differ(inputs: Mapping[str, ModelInputs], name: str) -> bool:
    """Whether a model has another tokenizer than the teacher, whose tokens are then others."""
    return inputs[name].tokenizer is not inputs["teacher"].tokenizer


def _write(
    model: Any, source: ModelInputs, prompts: list[Tokens], new_tokens: int, size: int, device: str
) -> Written:
    stop = models.stop_tokens(model, source.tokenizer)
    with models.on_device(device, model), models.silence_transformers():
        replies = write_replies(model, prompts, stop, new_tokens, size)
    return Written(prompts, replies, stop)


def _describe(written: Written) -> Generation:
    """How the replies end, their length, and how often they repeat tokens."""
    replies, count = written.replies, len(written.replies)
    stopped = sum(reply[-1] in written.stop for reply in replies) / count
    return Generation(
        stopped=Interval(stopped, *quality.share_interval(stopped, count)),
        tokens=sum(map(len, replies)) / count,
        distinct_1=distinct(replies, 1),
        distinct_2=distinct(replies, 2),
    )


def _scores(
    source: ModelInputs, written: Written, references: list[str], settings: MeasureSettings
) -> dict[str, Interval]:
    """Scores of the replies whose prompts have a reference."""
    texts = [  # a stop token is no part of the text, even if the tokenizer does not hide it
        _text(source, ids[:-1] if ids[-1] in written.stop else ids) for ids in written.replies
    ]
    return score_replies(
        list(compress(texts, references)),
        list(filter(None, references)),
        settings.evaluate.bootstrap,
        settings.seed,
    )


def _fidelity(
    task: Task,
    pair: Mapping[str, Any],
    source: ModelInputs,
    written: Written,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Agreement with the teacher, and divergence from it, over the tokens of a model's replies."""
    examples = _as_examples(written.prompts, written.replies)
    inputs = dict.fromkeys(pair, ModelInputs(source.tokenizer, examples))
    batches = model_batches(task, inputs, data.BatchPlan(examples, data.Batching(batch_size)))
    _, fidelity = collect_outcomes(task, pair, batches, device)
    return {
        "agreement": fidelity["student"].agreement,
        "divergence": fidelity["student"].divergence,
    }


def _as_examples(prompts: Sequence[Tokens], replies: Sequence[Tokens]) -> Dataset:
    """Encoded examples that predict the tokens of replies after their prompts."""
    pairs = list(zip(prompts, replies, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + reply for prompt, reply in pairs],
            "labels": [[losses.IGNORED] * len(prompt) + reply for prompt, reply in pairs],
            "size": [0] * len(pairs),
            "length": [len(prompt) + len(reply) for prompt, reply in pairs],
            "rows": [len(reply) for _, reply in pairs],
        }
    )


def _examples(
    written: Mapping[str, Written], inputs: Mapping[str, ModelInputs], references: list[str]
) -> list[dict[str, str]]:
    """The texts of some prompts, of their references and replies, evenly spaced."""
    student = written["student"]
    shown = []
    for index in evenly_spaced(len(student.replies), SHOWN):
        texts = {"prompt": _text(inputs["student"], student.prompts[index])}
        if references:
            texts["reference"] = references[index]
        shown.append(
            texts
            | {name: _text(inputs[name], each.replies[index]) for name, each in written.items()}
        )
    return shown


def _text(source: ModelInputs, ids: Tokens) -> str:
    return source.tokenizer.decode(ids, skip_special_tokens=True)
