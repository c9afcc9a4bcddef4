"""What a data loader hands to models and loss.

Shapes: B = examples, L = tokens of the longest example, C = classes or vocabulary, N = rows,
D = hidden size, K = tokens of a sparse distribution, T = tokens of all examples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CachedHidden(NamedTuple):
    """Cached hidden states of a teacher; its head turns them into logits."""

    states_ND: Tensor


class SparseTargets(NamedTuple):
    """A few tokens of the teacher's distribution, see :mod:`distill.losses.sparse`."""

    ids_NK: Tensor  # token ids
    probs_NK: Tensor  # probabilities at the loss's temperature, sum 1 over K; 0 is padding
    entropy_N: Tensor  # entropy of the teacher's full distribution, nats


class TailTargets(NamedTuple):
    """A few tokens of the teacher's distribution, and all others as one class."""

    ids_NK: Tensor  # token ids
    probs_NK: Tensor  # probabilities
    entropy_N: Tensor  # entropy of the distribution over K + 1 classes, nats
    tail_N: Tensor  # probability of all other tokens


FewTokens = SparseTargets | TailTargets  # arguments of :func:`distill.losses.sparse_kl`


class PackedLayout(NamedTuple):
    """Where the tokens of a packed batch would be in the padded one."""

    slots_T: Tensor  # b * L + i for token i of example b
    shape: tuple[int, int]  # (B, L)

    def pad(self, states_T: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), with 0 at padding."""
        size = self.shape[0] * self.shape[1]
        if size > len(states_T):
            empty = states_T.new_zeros(size, *states_T.shape[1:])
            states_T = empty.index_copy(0, self.slots_T, states_T)
        return states_T.unflatten(0, self.shape)

    def unpad(self, states_BL: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        states = states_BL.flatten(0, 1)
        return states if len(states) == len(self.slots_T) else states.index_select(0, self.slots_T)


class Batch(NamedTuple):
    """One micro-batch, the input of models and loss.

    In a packed batch, the examples follow each other without padding: inputs have the shape (1, T),
    and positions count in these T tokens.
    """

    inputs: dict[str, Tensor]  # arguments of the models: input_ids, attention_mask, ..., (B, L)
    labels: Tensor  # (N,) or (N, C); -100 or NaN where a row has no label
    positions: Tensor | None  # (N,) rows in the flattened (B * L) logits; None: one row per example
    example: Tensor  # (N,) index of the example, 0 to B - 1, that each row belongs to
    size: Tensor  # (B,) weight of an example in metrics: 1, or the UTF-8 bytes it predicts
    # Cached outputs of the teacher; a tensor holds logits, (N, C).
    teacher: Tensor | CachedHidden | FewTokens | None = None
    rows: float = 1.0  # rows of the global batch: the normalizer of the loss
    tokens: float = 1.0  # tokens of the global batch: the normalizer of loss terms
    padded: bool | None = None  # whether a row has padding; None: unknown
    packed: PackedLayout | None = None  # None: the examples are padded
    # (N,) span of the same bytes that each row's token belongs to, where the teacher predicts other
    # tokens; -1: none. The teacher's batch has the same spans.
    spans: Tensor | None = None
    # The same examples as an online teacher with another tokenizer reads them.
    teacher_batch: "Batch | None" = None

    def for_teacher(self) -> "Batch":
        """The batch that an online teacher reads."""
        return self if self.teacher_batch is None else self.teacher_batch

    def pad(self, states: Tensor) -> Tensor:
        """States of the tokens that models read, as (B, L, ...) also where the batch is packed."""
        return states if self.packed is None else self.packed.pad(states[0])

    def without_numbers(self) -> "Batch":
        """The batch without what a compiled graph would take as constants."""
        other = None if self.teacher_batch is None else self.teacher_batch.without_numbers()
        return self._replace(rows=1.0, tokens=1.0, padded=None, teacher_batch=other)


def join_columns(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate columns by name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sum_per_example(values_N: Tensor, batch: Batch) -> Tensor:
    """Sum the values of rows over the example that each row belongs to, (B,)."""
    return torch.zeros(len(batch.size), dtype=values_N.dtype, device=values_N.device).index_add(
        0, batch.example, values_N
    )
