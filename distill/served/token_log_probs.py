"""The likeliest tokens at each predicted position of an example, as a server gave them.

N = predicted tokens of an example, K = tokens of a position.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_ROUNDING = 1e-2  # sum of probabilities above 1 that a server's rounding explains


class Candidate(NamedTuple):
    """A token that a server listed."""

    log_prob: float  # nats, at temperature 1
    text: str | None  # as the server's tokenizer decodes it


class InvalidReply(Exception):
    """A reply without what was requested; the message says what it has instead."""


@dataclass(frozen=True)
class TokenLogProbs:
    """What a server gave for one example, at temperature 1."""

    ids_NK: np.ndarray  # int32, the likeliest first
    log_probs_NK: np.ndarray  # float32, nats
    labels_N: np.ndarray  # float32, nats: those of the tokens that follow; NaN: not listed
    texts: dict[int, str] = field(default_factory=dict)  # token -> as the server decodes it

    @property
    def tails(self) -> np.ndarray:
        """The probability of all other tokens, float32."""
        total_N = np.exp(self.log_probs_NK.astype(np.float64)).sum(1)
        return np.maximum(1 - total_N, 0).astype(np.float32)

    def distances(self, other: "TokenLogProbs") -> np.ndarray:
        """Half the sum of absolute differences of the probabilities, (N,); a lower bound of the
        total variation, for what one lists and the other does not counts in the tail of both.
        """
        return np.array(
            [
                _distance(self.by_token(row), other.by_token(row), tails)
                for row, tails in enumerate(zip(self.tails, other.tails, strict=True))
            ]
        )

    def by_token(self, row: int) -> dict[int, float]:
        """The probabilities that are listed at a position."""
        probs_K = np.exp(self.log_probs_NK[row].astype(np.float64))
        return dict(zip(self.ids_NK[row].tolist(), probs_K.tolist(), strict=True))


def _distance(one: dict[int, float], other: dict[int, float], tails: tuple[float, float]) -> float:
    shared = one.keys() & other.keys()
    listed = sum(abs(one[token] - other[token]) for token in shared)
    rest = [
        tail + sum(probs[token] for token in probs.keys() - shared)
        for probs, tail in zip((one, other), tails, strict=True)
    ]
    return (listed + abs(rest[0] - rest[1])) / 2


def collect(
    positions: Sequence[Mapping[int, Candidate]], labels: Sequence[int], k: int, tokens: int
) -> TokenLogProbs:
    """Check what a server listed at each predicted position, and keep the k likeliest tokens.

    Args:
        positions: The listed tokens, at least k; the token that follows may be one more.
        labels: The tokens that follow, (N,).
        k: K.
        tokens: Size of the vocabulary.

    Raises:
        InvalidReply: Too few tokens are listed, or values that are no log-probabilities.
    """
    ids_NK = np.empty((len(labels), k), np.int32)
    log_probs_NK = np.empty((len(labels), k), np.float32)
    labels_N = np.full(len(labels), np.nan, np.float32)
    texts: dict[int, str] = {}
    for row, (listed, label) in enumerate(zip(positions, labels, strict=True)):
        _check(listed, k, tokens)
        likeliest = sorted(listed, key=lambda token: (-listed[token].log_prob, token))[:k]
        ids_NK[row] = likeliest
        log_probs_NK[row] = [listed[token].log_prob for token in likeliest]
        if label in listed:
            labels_N[row] = listed[label].log_prob
        texts.update({i: each.text for i, each in listed.items() if each.text is not None})
    return TokenLogProbs(ids_NK, log_probs_NK, labels_N, texts)


def _check(listed: Mapping[int, Candidate], k: int, tokens: int) -> None:
    if len(listed) < k:
        raise InvalidReply(f"{len(listed)} tokens at a position instead of {k}")
    beyond = [token for token in listed if not 0 <= token < tokens]
    if beyond:
        raise InvalidReply(f"token {beyond[0]}, but the tokenizer has {tokens} tokens")
    values = [each.log_prob for each in listed.values()]
    if any(math.isnan(value) or value > _ROUNDING for value in values):
        raise InvalidReply(f"{max(values, key=_badness):g} as a log-probability")
    total = math.fsum(map(math.exp, values))
    if total > 1 + _ROUNDING:
        raise InvalidReply(f"probabilities at a position whose sum is {total:.3g}")


def _badness(value: float) -> float:
    return math.inf if math.isnan(value) else value
