"""Losses between language models of different tokenizers, over spans of the same bytes.

A span is the shortest run of the student's tokens with the bytes of a run of the teacher's, before
which both have read the same text. Two things of a span can be compared, and both are approximate:

- the likelihood of its bytes, as the product of the probabilities of its tokens: other ways to
  divide the bytes into tokens are left out, which are unlikely for models that know one way only.
- the distributions of its first token: without a common vocabulary only the sorted probabilities
  can be compared, not which token has them.

N = rows of a model, C = its vocabulary, S = spans.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.divergences import MAX_LOGIT
from distill.losses.products import at_least_float32

_CERTAIN = 1e-6  # nats: a likelihood is taken as at most exp(-1e-6), where log(1 - p) is finite


class SpanRows(NamedTuple):
    """The rows of one model and the spans that they belong to."""

    logits_NC: Tensor
    labels_N: Tensor  # the token that each row predicts
    spans_N: Tensor  # span of that token, in the order of the rows; -1: none


def span_kl(student: SpanRows, teacher: SpanRows, temperature: float) -> Tensor:
    """T^2 * KL of two classes, the bytes of a span and all others, (S,), in nats.

    At T = 1 it is at most the divergence of the models' distributions of the span's first token
    where the span is one token of both, since it joins all other tokens.
    """
    log_p = _log_likelihoods(teacher, temperature)
    log_q = _log_likelihoods(student, temperature)
    p = log_p.exp()
    others = torch.log1p(-p) - torch.log(-torch.expm1(log_q))
    return temperature**2 * (p * (log_p - log_q) + (1 - p) * others)


def uld(student: SpanRows, teacher: SpanRows, temperature: float) -> Tensor:
    """T^2 * sum |sorted p - sorted q| at the first token of each span, (S,), in [0, 2 T^2].

    The smaller vocabulary gets tokens of probability 0. Source: Universal Logit Distillation,
    Boizard et al. 2024.
    """
    p, q = (_sorted(rows, temperature) for rows in (teacher, student))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in (p, q))
    return temperature**2 * (p - q).abs().sum(-1)


def first_rows(spans_N: Tensor) -> Tensor:
    """Whether each row is the first of a span, (N,)."""
    before = torch.nn.functional.pad(spans_N[:-1], (1, 0), value=-1)
    return (spans_N >= 0) & (spans_N != before)


def _log_softmax(logits_NC: Tensor, temperature: float) -> Tensor:
    logits_NC = at_least_float32(logits_NC).clamp(-MAX_LOGIT, MAX_LOGIT)
    return (logits_NC / temperature).log_softmax(-1)


def _log_likelihoods(rows: SpanRows, temperature: float) -> Tensor:
    """Sum of the log-probabilities of a span's tokens, (S,)."""
    inside = rows.spans_N >= 0
    log_p = _log_softmax(rows.logits_NC[inside], temperature)
    values = log_p.gather(-1, rows.labels_N[inside, None])[:, 0]
    spans = rows.spans_N[inside]
    count = int(first_rows(rows.spans_N).sum())
    return values.new_zeros(count).index_add(0, spans, values).clamp(max=-_CERTAIN)


def _sorted(rows: SpanRows, temperature: float) -> Tensor:
    """The probabilities at the first row of each span, the largest first, (S, C)."""
    logits_SC = rows.logits_NC[first_rows(rows.spans_N)]
    return _log_softmax(logits_SC, temperature).exp().sort(-1, descending=True).values
