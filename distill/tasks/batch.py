"""What a data loader hands to models and loss.

Shapes: B = examples, L = tokens of the longest example, C = classes or vocabulary, N = rows,
D = hidden size, K = tokens of a sparse distribution.
"""

from typing import NamedTuple

from torch import Tensor


class CachedHidden(NamedTuple):
    """Cached hidden states of a teacher; its head turns them into logits."""

    states_ND: Tensor


class SparseTargets(NamedTuple):
    """A few tokens of the teacher's distribution, see :mod:`distill.losses.sparse`."""

    ids_NK: Tensor  # token ids
    probs_NK: Tensor  # probabilities at the loss's temperature, sum 1 over K; 0 is padding
    entropy_N: Tensor  # entropy of the teacher's full distribution, nats


class Batch(NamedTuple):
    """One micro-batch, the input of models and loss."""

    inputs: dict[str, Tensor]  # arguments of the models: input_ids, attention_mask, ..., (B, L)
    labels: Tensor  # (N,) or (N, C); -100 or NaN where a row has no label
    positions: Tensor | None  # (N,) rows in the flattened (B * L) logits; None: one row per example
    example: Tensor  # (N,) index of the example, 0 to B - 1, that each row belongs to
    size: Tensor  # (B,) weight of an example in metrics: 1, or the UTF-8 bytes it predicts
    # Cached outputs of the teacher; a tensor holds logits, (N, C).
    teacher: Tensor | CachedHidden | SparseTargets | None = None
    rows: float = 1.0  # rows of the global batch: the normalizer of the loss
    tokens: float = 1.0  # tokens of the global batch: the normalizer of loss terms
    padded: bool | None = None  # whether a row has padding; None: unknown
    # The same examples as an online teacher with another tokenizer reads them.
    teacher_batch: "Batch | None" = None

    def for_teacher(self) -> "Batch":
        """The batch that an online teacher reads."""
        return self if self.teacher_batch is None else self.teacher_batch

    def without_numbers(self) -> "Batch":
        """The batch without what a compiled graph would take as constants."""
        other = None if self.teacher_batch is None else self.teacher_batch.without_numbers()
        return self._replace(rows=1.0, tokens=1.0, padded=None, teacher_batch=other)
