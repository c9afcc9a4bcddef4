"""A batch -> a few tokens of the teacher's distribution for each row.

N = rows of a batch, B = examples, C = vocabulary, K = stored tokens per row,
W = stored numbers per row.
"""

from abc import abstractmethod

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import models
from distill.data import teacher_columns
from distill.errors import UserError
from distill.losses import chunk_sizes, chunked, sparse
from distill.losses.chunk_sizes import chunk_bytes
from distill.tasks.base import Task
from distill.tasks.batch import Batch
from distill.teacher_outputs.outputs import Arrays, TeacherOutputs, matrix

DOUBLES = 8  # float32 logits in the memory of what sampling computes from each in float64


class _SparseOutputs(TeacherOutputs):
    """A few tokens of each row's distribution at the loss's temperature.

    Args:
        teacher: A language model.
        task: Selects the rows.
        temperature: Temperature of the loss.
        tokens: Size of the vocabulary; further logits are dropped.
    """

    dtype = np.int32

    def __init__(
        self, teacher: PreTrainedModel, task: Task, temperature: float, tokens: int
    ) -> None:
        super().__init__(teacher, task)
        self.temperature = temperature
        self.classes = None if tokens == models.num_logits(teacher) else tokens

    def rows(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """Process the rows in chunks, so that not all logits are in memory at once."""
        logits, offset_N = self._logit_rows(batch, self.classes), self.offsets(batch, examples)
        device = self.teacher.device
        size = chunk_bytes(device) // (1 if device.type == "cpu" else DOUBLES)
        rows = chunk_sizes.rows_within(models.num_logits(self.teacher), size)
        chunk = chunked.logit_chunks(logits)
        return torch.cat(
            [
                self.select(chunk(part), offset_N[part])
                for part in chunk_sizes.chunk_slices(len(offset_N), rows)
            ]
        )

    def offsets(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """The sampling offset of each row, (N,)."""
        return torch.zeros(len(batch.example))

    @abstractmethod
    def select(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        """The stored numbers of some rows, (N, W), int32."""


class SampledOutputs(_SparseOutputs):
    """Sampled tokens with counts, with which :func:`distill.losses.sparse_kl` is unbiased.

    Args:
        teacher: A language model.
        task: Selects the rows.
        temperature: Temperature of the loss.
        tokens: Size of the vocabulary.
        draws: Draws per row.
        seed: Seed of the draws.
    """

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
                f"teacher.outputs is sampled, but the vocabulary has {tokens} tokens and at most "
                f"{sparse.TOKENS} can be stored: set teacher.outputs=hidden"
            )
        self.draws, self.seed = draws, seed
        self.width, self.size = 1 + draws, 4 + sparse.BYTES * draws
        self.identity = ["sampled", "counts", temperature, tokens, draws, seed]

    def offsets(self, batch: Batch, examples: np.ndarray) -> Tensor:
        """Uniform in [0, 1); they depend on seed and example, not on batch, chunk or process."""
        counts = np.bincount(batch.example.cpu().numpy(), minlength=len(examples))
        offsets = [
            np.random.default_rng([self.seed, example]).random(count)
            for example, count in zip(examples, counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(offsets)).to(self.teacher.device, non_blocking=True)

    def select(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        counts_NC, entropy_N = sparse.sample_counts(
            logits_NC, self.temperature, self.draws, offset_N
        )
        return torch.cat(
            [entropy_N.view(torch.int32)[:, None], sparse.encode_counts(counts_NC, self.draws)], 1
        )

    def columns(self, values_NW: np.ndarray, ends_B: np.ndarray) -> Arrays:
        encoded_NK = values_NW[:, 1:]
        end_bytes_N = sparse.BYTES * (encoded_NK >= 0).sum(1).cumsum()
        offsets = pa.array([0, *end_bytes_N[ends_B - 1].tolist()], pa.int32())
        counts = pa.ListArray.from_arrays(offsets, pa.array(sparse.pack_counts(encoded_NK)))
        entropy = super().columns(values_NW[:, :1].copy(), ends_B)
        return {teacher_columns.COUNTS: counts, **entropy}

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        return {teacher_columns.ENTROPY: pa.array(values_NW[:, 0].view(np.float32))}


class TopKOutputs(_SparseOutputs):
    """The k most likely tokens; all others get probability 0, which biases the loss.

    Args:
        teacher: A language model.
        task: Selects the rows.
        temperature: Temperature of the loss.
        tokens: Size of the vocabulary.
        k: Stored tokens per row.
    """

    def __init__(
        self, teacher: PreTrainedModel, task: Task, temperature: float, tokens: int, k: int
    ) -> None:
        super().__init__(teacher, task, temperature, tokens)
        self.k = min(k, tokens)
        self.width, self.size = 2 * self.k, 8 * self.k
        self.identity = ["top_k", "probs", temperature, tokens, k]

    def select(self, logits_NC: Tensor, offset_N: Tensor) -> Tensor:
        ids_NK, probs_NK = sparse.top_k(logits_NC, self.temperature, self.k)
        return torch.cat([ids_NK, probs_NK.view(torch.int32)], 1)

    def arrays(self, values_NW: np.ndarray) -> Arrays:
        ids_NK, probs_NK = values_NW[:, : self.k], values_NW[:, self.k :]
        return {
            teacher_columns.IDS: matrix(ids_NK),
            teacher_columns.PROBS: matrix(np.ascontiguousarray(probs_NK).view(np.float32)),
        }
