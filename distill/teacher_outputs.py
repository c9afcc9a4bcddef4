"""A teacher's answers to a batch -> rows of numbers -> columns of a file: one class for each `teacher.outputs` that is stored.

N = rows of a batch, B = examples of a chunk, C = classes or vocabulary, D = width, W = numbers that are kept of a row.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import models
from distill.data import teacher_columns
from distill.errors import UserError
from distill.losses import chunked, sparse
from distill.recipe import config
from distill.tasks.base import Batch, Task

log = logging.getLogger(__name__)

Arrays = dict[str, pa.Array]
RAW = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
}  # numpy knows no bfloat16: its bits


class TeacherOutputs(ABC):
    """What is kept of a teacher's answers."""

    identity: list[Any]  # what decides it, beside teacher and examples
    width: int  # numbers of a row in memory
    dtype: Any = np.float32  # of these
    size: float  # bytes of a row in the file, at the most

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        self.teacher, self.task, self.identity = teacher, task, []
        self.factors = task.selects_positions and models.has_linear_head(teacher)

    @abstractmethod
    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """(N, W); `examples` are the numbers of the batch's examples in the whole split."""

    @abstractmethod
    def arrays(self, values_NW: np.ndarray) -> Arrays:
        """Columns that hold the rows one after the other."""

    def columns(self, values_NW: np.ndarray, ends_B: np.ndarray) -> Arrays:
        """The same with a list of rows for each example."""
        offsets = pa.array(np.concatenate([[0], ends_B]), pa.int32())
        return {
            name: pa.ListArray.from_arrays(offsets, array)
            for name, array in self.arrays(values_NW).items()
        }

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        none = self.columns(np.empty((0, self.width), self.dtype), np.empty(0, np.int64))
        return pa.schema({name: array.type for name, array in none.items()})

    def _answer(self, batch: Batch, classes: int | None = None) -> chunked.FactoredLogits | Tensor:
        return models.logit_rows(
            self.teacher,
            batch.inputs,
            lambda places: self.task.rows(places, batch),
            classes,
            self.factors,
        )


class LogitOutputs(TeacherOutputs):
    """All of them, in float32."""

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        super().__init__(teacher, task)
        self.factors = False
        self.width = models.num_logits(teacher)
        self.size = 4 * self.width

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        answered = self._answer(batch)
        assert isinstance(answered, Tensor)
        return answered.float()

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.LOGITS: _matrix(values_NW)}


class HiddenStateOutputs(TeacherOutputs):
    """The hidden states that the teacher's head reads, in the teacher's dtype: with the head they are the logits, exactly."""

    def __init__(self, teacher: PreTrainedModel, task: Task) -> None:
        super().__init__(teacher, task)
        if not self.factors:
            raise UserError(
                f"teacher.outputs is hidden, but the logits of {type(teacher).__name__} are not what a linear head makes of "
                "its hidden states: set teacher.outputs=online"
            )
        self.identity, self.dtype = ["hidden"], RAW[teacher.dtype]
        self.width = teacher.get_output_embeddings().in_features
        self.size = self.width * teacher.dtype.itemsize

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        states_ND = models.head_inputs(
            self.teacher, batch.inputs, lambda places: self.task.rows(places, batch)
        )
        return states_ND.view(torch.int16) if states_ND.dtype == torch.bfloat16 else states_ND

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.STATES: _matrix(values_NW)}


class _SparseOutputs(TeacherOutputs):
    """Some tokens of each row's distribution at the loss's temperature, over the tokens that exist."""

    dtype = np.int32

    def __init__(
        self, teacher: PreTrainedModel, task: Task, temperature: float, tokens: int
    ) -> None:
        super().__init__(teacher, task)
        self.temperature = temperature
        self.classes = None if tokens == models.num_logits(teacher) else tokens

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """Chosen from some rows of logits at a time."""
        answered, offset_N = self._answer(batch, self.classes), self.offsets(batch, examples)
        parts = chunked.chunk_slices(
            len(offset_N), chunked.rows_within(models.num_logits(self.teacher), chunked.CHUNK_BYTES)
        )
        return torch.cat(
            [self.chosen(chunked.teacher_chunk(answered, part), offset_N[part]) for part in parts]
        )

    def offsets(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """A number of each row's own, for what is left to chance."""
        return torch.zeros(len(batch.example))

    @abstractmethod
    def chosen(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        """(N, W) 32-bit integers."""


class SampledOutputs(_SparseOutputs):
    """Tokens drawn from it, with counts: the expected gradient of :func:`distill.losses.sparse_kl` is that of forward_kl."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        task: Task,
        temperature: float,
        tokens: int,
        draws: int,
        seed: int,
    ) -> None:
        super().__init__(teacher, task, temperature, tokens)
        if tokens > sparse.TOKENS:
            raise UserError(
                f"teacher.outputs is sampled, but the vocabulary has {tokens} tokens and {sparse.TOKENS} is the most that can be stored: "
                "set teacher.outputs=hidden"
            )
        self.draws, self.seed = draws, seed
        self.width, self.size = 1 + draws, 4 + sparse.BYTES * draws
        self.identity = ["sampled", temperature, tokens, draws, seed]

    def offsets(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """Uniform in [0, 1), whatever batch, chunk or process an example is in."""
        counts = np.bincount(batch.example.cpu().numpy(), minlength=len(examples))
        own = [
            np.random.default_rng([self.seed, example]).random(count)
            for example, count in zip(examples, counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(own)).to(batch.example.device)

    def chosen(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        counts_NC, entropy_N = sparse.sample_counts(
            logits_NC, self.temperature, self.draws, offset_N
        )
        return torch.cat(
            [entropy_N.view(torch.int32)[:, None], sparse.encode_counts(counts_NC, self.draws)], 1
        )

    def columns(self, values_NW: np.ndarray, ends_B: np.ndarray) -> Arrays:
        codes = values_NW[:, 1:]
        bytes_N = sparse.BYTES * (codes >= 0).sum(1).cumsum()
        offsets = pa.array([0, *bytes_N[ends_B - 1].tolist()], pa.int32())
        entropy = super().columns(values_NW[:, :1].copy(), ends_B)
        return {
            teacher_columns.CODES: pa.ListArray.from_arrays(
                offsets, pa.array(sparse.pack_counts(codes))
            ),
            **entropy,
        }

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.ENTROPY: pa.array(values_NW[:, 0].view(np.float32))}


class TopKOutputs(_SparseOutputs):
    """The likeliest tokens: what is left out counts as impossible, which no number of examples makes good."""

    def __init__(
        self, teacher: PreTrainedModel, task: Task, temperature: float, tokens: int, kept: int
    ) -> None:
        super().__init__(teacher, task, temperature, tokens)
        self.kept = min(kept, tokens)
        self.width, self.size = 2 * self.kept, 8 * self.kept
        self.identity = ["top_k", temperature, tokens, kept]

    def chosen(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        ids_NK, shares_NK = sparse.top_k(logits_NC, self.temperature, self.kept)
        return torch.cat([ids_NK, shares_NK.view(torch.int32)], 1)

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        ids_NK, shares_NK = values_NW[:, : self.kept], values_NW[:, self.kept :]
        return {
            teacher_columns.IDS: _matrix(ids_NK),
            teacher_columns.SHARES: _matrix(np.ascontiguousarray(shares_NK).view(np.float32)),
        }


def check_outputs(run: config.Run, task: Task) -> None:
    """UserError where the outputs that the recipe names are not for its task; a warning where they are biased."""
    assert run.teacher is not None
    name = run.teacher.outputs
    if name not in ("cached", "online") and not task.selects_positions:
        raise UserError(
            f"teacher.outputs is {name}, but {type(task).__name__} has few logits a row, which are kept whole: set teacher.outputs=cached"
        )
    if name == "top_k":
        log.warning(
            "teacher.outputs is top_k: the student learns that all but the teacher's %d likeliest tokens are impossible, however "
            "long it is trained; sampled takes fewer bytes and has the right gradient on average",
            run.teacher.tokens,
        )


def build_outputs(
    run: config.Run, teacher: PreTrainedModel, task: Task, tokens: int
) -> TeacherOutputs:
    """What the recipe asks for; `tokens` are those of the tokenizer."""
    assert run.teacher is not None
    settings, temperature = run.teacher, run.loss.temperature
    match settings.outputs:
        case "hidden":
            return HiddenStateOutputs(teacher, task)
        case "sampled":
            return SampledOutputs(teacher, task, temperature, tokens, settings.tokens, run.seed)
        case "top_k":
            return TopKOutputs(teacher, task, temperature, tokens, settings.tokens)
    return LogitOutputs(teacher, task)


def _matrix(values_NW: np.ndarray) -> pa.Array:
    """Rows of equal length, without a copy where they lie one after the other."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NW.reshape(-1)), values_NW.shape[1])
