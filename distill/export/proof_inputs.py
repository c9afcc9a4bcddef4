"""The inputs of a proof: held-out texts, and the student's logits for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from distill import models
from distill.data import columns_to_examples
from distill.losses.chunked import LogitRows
from distill.packing import ExportSpec
from distill.recipe import config
from distill.tasks.batch import Batch


@dataclass(frozen=True)
class ProofInputs:
    """What a proof compares, and under which conditions.

    Args:
        spec: what the export needs.
        texts: raw held-out rows.
        trained: the folder of the trained student.
        teacher: the folder of the teacher; None without one.
        evaluate: the recipe's section `evaluate`: batch size, threads, resamples.
        device: device on which transformers runs the models.
        seed: seed of the resamples.
    """

    spec: ExportSpec
    texts: Dataset
    trained: Path
    teacher: Path | None
    evaluate: config.Evaluate
    device: str
    seed: int

    @property
    def cells(self) -> list[list[str]]:
        """The text columns of each request."""
        return self.spec.task.requests(self.texts, self.spec.data, self.spec.tokenizer)

    def batches(self, size: int, keep_end: bool = False) -> list[Batch]:
        """The encoded requests in batches of that size; see :meth:`Serving.encode_requests`."""
        spec, batches = self.spec, []
        for first in range(0, len(self.texts), size):
            part = self.texts.select(range(first, min(first + size, len(self.texts))))
            columns = spec.task.encode_requests(part[:], spec.tokenizer, spec.data, keep_end)
            examples = columns_to_examples(columns)
            batches.append(spec.task.collate(examples, spec.tokenizer.pad_token_id))
        return batches

    def examples(self) -> list[Batch]:
        """The encoded requests, one by one."""
        spec = self.spec
        columns = spec.task.encode_requests(self.texts[:], spec.tokenizer, spec.data)
        pad_id = spec.tokenizer.pad_token_id
        return [spec.task.collate([example], pad_id) for example in columns_to_examples(columns)]

    @contextmanager
    def load_student(self, folder: Path, device: str) -> Iterator[PreTrainedModel]:
        """Load a student in this process, with the number of threads of the export's process."""
        spec, threads = self.spec, torch.get_num_threads()
        model = models.load(str(folder), None, spec.task, "student", spec.tokenizer, strict=True)
        torch.set_num_threads(self.evaluate.threads)
        try:
            with models.on_device(device, model):
                yield model
        finally:
            torch.set_num_threads(threads)


@torch.inference_mode()
def compute_logits(model: Any, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The logits of each batch, in float32 on the CPU."""
    for batch in batches:
        yield models.logits(model, _inputs(model, batch)).float().cpu()


@torch.inference_mode()
def compute_rows(
    model: Any, batches: Sequence[Batch], select: Callable[[Tensor, Batch], Tensor]
) -> Iterator[LogitRows]:
    """Rows of a language model's logits for each batch, as factors for a large vocabulary."""
    factors = models.has_linear_head(model)
    for batch in batches:
        yield models.evaluated_rows(model, _inputs(model, batch), _rows_of(select, batch), factors)


def _rows_of(select: Callable[[Tensor, Batch], Tensor], batch: Batch) -> Callable[[Tensor], Tensor]:
    return lambda positions: select(positions, batch)


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
