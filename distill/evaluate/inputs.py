"""The inputs of measurements: encoded examples and timed inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict
from transformers import AutoConfig

from distill import data, models
from distill.compress import tokenizer_trim
from distill.evaluate.cost import TimedInputs
from distill.models import resolve_path, translate_errors
from distill.prepare import Prepared
from distill.recipe import config
from distill.remote_code.modeling import CompressionConfig
from distill.tasks.base import Task


class ModelInputs(NamedTuple):
    """The examples of a split as a model's tokenizer encodes them."""

    tokenizer: Any
    examples: Dataset


def inputs_by_model(
    prepared: Prepared, settings: config.Data, models_: Mapping[str, str], split: str
) -> dict[str, ModelInputs]:
    """The inputs of each model, the same for all that read with one tokenizer.

    Args:
        prepared: The data, with this split encoded.
        settings: The recipe's section `data`.
        models_: Folder or name of each model.
        split: Split of the data.
    """
    shared = ModelInputs(prepared.tokenizer, prepared.examples[split])
    inputs = dict.fromkeys(models_, shared)
    if prepared.teacher is not None and "teacher" in inputs:
        inputs["teacher"] = ModelInputs(
            prepared.teacher.tokenizer, prepared.teacher.examples[split]
        )
    tokenizer = trimmed_tokenizer(models_["student"], shared.tokenizer)
    if tokenizer is not None:
        raw = DatasetDict({split: prepared.raw[split]})
        encoded = data.encode(raw, prepared.task, tokenizer, settings)
        inputs["student"] = ModelInputs(tokenizer, encoded[split])
    return inputs


def trimmed_tokenizer(student: str, tokenizer: Any) -> Any:
    """The student's tokenizer if tokens of `tokenizer` were trimmed from it, else None."""
    path = resolve_path(student, "student")
    with translate_errors(student, "student", Path(path).is_dir()):
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    if CompressionConfig.from_json(settings.get("compression")).vocabulary is None:
        return None
    trimmed = models.load_tokenizer(student, "student")
    vocabulary, full_vocabulary = trimmed.get_vocab(), tokenizer.get_vocab()
    if vocabulary == full_vocabulary:
        return None
    return trimmed if tokenizer_trim.is_trimmed_vocabulary(vocabulary, full_vocabulary) else None


def timed_inputs(task: Task, inputs: ModelInputs, settings: config.Evaluate) -> TimedInputs:
    """Single examples spread evenly over the split, and full batches of similar length."""
    examples, size = inputs.examples, settings.batch_size
    requests = [[index] for index in evenly_spaced(len(examples), settings.requests)]
    spread = evenly_spaced(len(examples), size * settings.batches)
    by_length = sorted(spread, key=examples["length"].__getitem__)
    last = max(len(by_length) - size, 0)
    batches = [by_length[first : first + size] for first in range(0, last + 1, size)]

    def collate(indices: list[int]) -> dict[str, list[list[int]]]:
        pad_id = inputs.tokenizer.pad_token_id
        batch = task.collate([examples[index] for index in indices], pad_id)
        return {name: tensor.tolist() for name, tensor in batch.inputs.items()}

    return TimedInputs(
        [collate(request) for request in requests], [collate(batch) for batch in batches]
    )


def evenly_spaced(size: int, count: int) -> list[int]:
    """`count` indices below `size`, evenly spaced; all of them if there are fewer."""
    count = min(count, size)
    return [index * size // count for index in range(count)]
