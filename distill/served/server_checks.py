"""Whether a server's log-probabilities can be believed.

A wrong tokenizer shows in the texts of the listed tokens, or in a likelihood below chance. A stale
prefix cache shows when prompts are sent again in another order. The rounding of a server that
batches requests differently each time changes probabilities by less than `MAX_DISTANCE`.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.served.token_log_probs import TokenLogProbs
from distill.teacher_outputs.label_check import MAX_EXCESS

log = logging.getLogger("distill")

MAX_DISTANCE = 0.2  # total variation at a position that rounding explains, bfloat16 and experts
MAX_MEAN_DISTANCE = 0.05  # the same, mean over the positions of an example
MAX_DIFFERENT = 0.01  # share of tokens whose text differs by how a server decodes single tokens
_MAX_SHOWN = 3
_NO_TEXT = "\ufffd"  # a token that is part of a character


def check_repeated(
    url: str, first: Sequence[TokenLogProbs], again: Sequence[TokenLogProbs]
) -> float:
    """Compare the log-probabilities of the same examples, requested twice in another order.

    Returns:
        The largest distance at a position.

    Raises:
        UserError: They differ by more than rounding.
    """
    largest = 0.0
    for number, (one, other) in enumerate(zip(first, again, strict=True)):
        distances = one.distances(other)
        place = int(distances.argmax())
        largest = max(largest, float(distances[place]))
        if largest > MAX_DISTANCE or distances.mean() > MAX_MEAN_DISTANCE:
            raise UserError(
                f"teacher.url is {url}, but the server gives other probabilities when an example "
                f"is sent again (of {len(first)} examples, number {number + 1} differs by "
                f"{distances[place]:.2f} at predicted token {place + 1}, and rounding by at most "
                f"{MAX_DISTANCE}): start it without a prefix cache, in vLLM with "
                "--no-enable-prefix-caching"
            )
    return largest


def check_tokenizer(url: str, results: Iterable[TokenLogProbs], tokenizer: Any) -> None:
    """Compare the texts of the tokens that a server listed with those of the tokenizer.

    Raises:
        UserError: They differ.
    """
    texts: dict[int, str] = {}
    for result in results:
        texts |= result.texts
    pairs = {token: (text, tokenizer.decode([token])) for token, text in texts.items()}
    differing = _differing(pairs)
    if len(differing) > MAX_DIFFERENT * max(len(pairs), 1):
        shown = "; ".join(
            f"{token} is {pairs[token][0]!r} there and {pairs[token][1]!r} here"
            for token in differing[:_MAX_SHOWN]
        )
        raise UserError(
            f"teacher.url is {url}, but the server has another tokenizer: {len(differing)} of "
            f"{len(pairs)} tokens differ ({shown}): take a student with the teacher's tokenizer"
        )


def _differing(pairs: Mapping[int, tuple[str, str]]) -> list[int]:
    """Tokens of different texts. Servers decode white space and parts of characters differently."""
    return [
        token
        for token, (served, local) in sorted(pairs.items())
        if _visible(served)
        and _visible(local)
        and _NO_TEXT not in served + local
        and _visible(served) != _visible(local)
    ]


def _visible(text: str) -> str:
    for space in ("\u2581", "\u0120"):  # spaces in tokens of SentencePiece and byte-level BPE
        text = text.replace(space, " ")
    return text.strip()


def check_likelihood(url: str, nll: float, tokens: int) -> None:
    """Refuse a teacher that is confidently wrong on the tokens of the texts.

    Args:
        url: Address of the server.
        nll: Its loss in nats per token; NaN where the server does not list the tokens themselves.
        tokens: Size of the vocabulary.
    """
    uniform = math.log(tokens)
    if nll > uniform + MAX_EXCESS:
        raise UserError(
            f"the loss of the teacher at {url} is {nll:.2f} nats per token, but predictions that "
            f"know nothing have {uniform:.2f}: its token ids are not those of the tokenizer, take "
            "a student with the teacher's tokenizer"
        )
    if nll >= uniform:
        log.warning(
            "the loss of the served teacher, %.2f nats per token, is not better than chance: "
            "a student can hardly learn from it",
            nll,
        )


def mean_loss(results: Iterable[TokenLogProbs]) -> float:
    """Nats per token, over the tokens whose log-probability is listed; NaN without any."""
    labels = np.concatenate([result.labels_N for result in results])
    listed = labels[~np.isnan(labels)]
    return float(-listed.mean()) if len(listed) else math.nan
