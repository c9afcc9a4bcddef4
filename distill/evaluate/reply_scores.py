"""Replies compared with those in the data: exact matches, shared words, fields of JSON objects.

N = replies, K = resamples.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from distill.evaluate.quality import interval, share_interval
from distill.evaluate.record_parts import Interval

EXACT, WORDS = "exact_match", "word_f1"
VALID, FIELDS, OBJECT = "valid_json", "field_f1", "exact_object"

Parts = Counter[Hashable]


def score_replies(
    replies: Sequence[str], references: Sequence[str], resamples: int, seed: int
) -> dict[str, Interval]:
    """Scores with their 95 % intervals; empty without references.

    `exact_match` is the share of replies with the text of the reference, but for white space at the
    ends. `word_f1` is the mean F1 of words without case and punctuation (Rajpurkar et al. 2016). If
    each reference is a JSON object: `valid_json` is the share of replies that are one too,
    `exact_object` the share with the same fields, and `field_f1` the F1 of all fields together,
    each a key with its value.

    Args:
        replies: Texts, N.
        references: Their references, N.
        resamples: Bootstrap resamples of the intervals of F1.
        seed: Draws them.
    """
    if not references:
        return {}
    pairs = list(zip(replies, references, strict=True))
    exact = [reply.strip() == reference.strip() for reply, reference in pairs]
    scores = {
        EXACT: _share(exact),
        WORDS: _f1(pairs, _words, _mean_f1, resamples, seed),
    }
    objects = [_object(reference) for reference in references]
    if any(each is None for each in objects):
        return scores
    valid = [_object(reply) is not None for reply in replies]
    same = [
        is_object and _fields(reply) == _fields(reference)
        for is_object, (reply, reference) in zip(valid, pairs, strict=True)
    ]
    return scores | {
        VALID: _share(valid),
        FIELDS: _f1(pairs, _fields, _pooled_f1, resamples, seed),
        OBJECT: _share(same),
    }


def _share(hits: Sequence[bool]) -> Interval:
    share = sum(hits) / len(hits)
    return Interval(share, *share_interval(share, len(hits)))


def _words(text: str) -> Parts:
    """The words of a text, in lower case, without punctuation."""
    letters = [" " if unicodedata.category(each).startswith("P") else each for each in text.lower()]
    return Counter("".join(letters).split())


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object of a text; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _fields(text: str) -> Parts:
    """The fields of a JSON object; none if it is none."""
    values = _object(text) or {}
    return Counter((key, json.dumps(value, sort_keys=True)) for key, value in values.items())


def _f1(
    pairs: Sequence[tuple[str, str]],
    parts: Callable[[str], Parts],
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> Interval:
    """An F1 of the parts of replies and references, with its bootstrap interval."""
    counted = [(parts(reply), parts(reference)) for reply, reference in pairs]
    counts_3N = np.array(
        [
            ((ours & theirs).total(), ours.total(), theirs.total())  # shared, and of each
            for ours, theirs in counted
        ],
        dtype=float,
    ).T
    size = len(pairs)
    generator = np.random.default_rng(seed)
    drawn_KN = generator.multinomial(size, np.full(size, 1 / size), resamples).astype(float)
    (value,) = combine(counts_3N, np.ones((1, size)))
    return interval(float(value), combine(counts_3N, drawn_KN))


def _mean_f1(counts_3N: np.ndarray, weights_KN: np.ndarray) -> np.ndarray:
    """The mean of the replies' F1, (K,)."""
    f1_N = _ratio(2 * counts_3N[0], counts_3N[1] + counts_3N[2])
    return weights_KN @ f1_N / weights_KN.sum(1)


def _pooled_f1(counts_3N: np.ndarray, weights_KN: np.ndarray) -> np.ndarray:
    """The F1 of the parts of all replies together, (K,)."""
    shared_K, ours_K, theirs_K = counts_3N @ weights_KN.T
    return _ratio(2 * shared_K, ours_K + theirs_K)


def _ratio(shared: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """2 x shared / parts; 1 where both texts have no part."""
    return np.divide(shared, parts, out=np.ones_like(parts), where=parts > 0)
