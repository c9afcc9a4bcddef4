"""Triton kernel of the loss of a language model: rows of logits -> values and gradient.

Imported only where Triton is installed (`fused.py`). One program per row reads the logits twice, or
three times if the gradient needs a sum over the row. Formulas are those of `divergences.py`;
gradients are written out:

    u = student / T, q = softmax(u), p = softmax(teacher / T), m = beta * p + (1 - beta) * q
    forward_kl      d/du = q - p
    reverse_kl      d/du = q * (log(q / p) - sum q log(q / p))
    jensen_shannon  d/du = (1 - beta) * q * (log(q / m) - sum q log(q / m))
    skew_kl         d/du = q * sum(p r) - p r, with r = (1 - beta) * q / m

-inf and larger logits than MAX_LOGIT are clamped as there, and pass no gradient to the divergence.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from distill.losses.divergences import IGNORED, MAX_LOGIT

LIMIT = tl.constexpr(MAX_LOGIT)
NO_LABEL = tl.constexpr(IGNORED)
LOWEST = tl.constexpr(-3e38)  # start of a running maximum; -inf would make NaN of differences
FORWARD, REVERSE, JENSEN_SHANNON, SKEW = (tl.constexpr(kind) for kind in (1, 2, 3, 4))
BLOCK = 2048  # columns that a program reads at once
WARPS = 8


@triton.jit
def _clamp(x, low, high):
    # Comparisons keep NaN, which `tl.minimum` would hide.
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _log1p(x):
    # Exact to rounding also for small x (Kahan).
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _expm1(x):
    # For |x| <= 1 (Kahan).
    y = tl.exp(x)
    log_y = tl.log(y)
    return tl.where(y == 1.0, x, (y - 1.0) * (x / tl.where(log_y == 0.0, 1.0, log_y)))


@triton.jit
def _log_mixture_ratio(gap, weight, log_weight, log_rest):
    # -log(1 - weight + weight * exp(gap)), exactly 0 at gap 0.
    near = _log1p(weight * _expm1(_clamp(gap, -1.0, 1.0)))
    high = gap + log_weight
    larger = tl.where(high > log_rest, high, log_rest)
    far = larger + tl.log(1.0 + tl.exp(-tl.abs(high - log_rest)))
    return -tl.where(tl.abs(gap) < 1.0, near, far)


@triton.jit
def _running_sum(highest, total, x, valid):
    # Each lane keeps its maximum and sum exp(x - maximum).
    rises = x > highest
    step = tl.exp(-tl.abs(x - highest))
    grown = tl.where(rises, total * step + 1.0, total + step)
    return tl.where(valid & rises, x, highest), tl.where(valid, grown, total)


@triton.jit
def _combine(highest, total):
    # Maximum and log sum of all lanes: log softmax(x) = (x - maximum) - log sum.
    maximum = tl.max(highest, 0)
    return maximum, tl.log(tl.sum(total * tl.exp(highest - maximum), 0))


@triton.jit
def _pair(student, teacher, column, valid, temperature):
    # The raw student logits, and both models' clamped logits divided by T.
    raw = tl.load(student + column, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(teacher + column, mask=valid, other=0.0).to(tl.float32)
    u = _clamp(raw, -LIMIT, LIMIT) / temperature
    return raw, u, _clamp(other, -LIMIT, LIMIT) / temperature


@triton.jit
def _terms(log_q, log_p, beta, log_beta, log_rest, KIND: tl.constexpr):
    # The summand of the divergence, and the summand of the sum in its gradient.
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if KIND == FORWARD:
        value = p * (log_p - log_q)
        inner = value
    elif KIND == REVERSE:
        value = q * (log_q - log_p)
        inner = value
    elif KIND == JENSEN_SHANNON:
        inner = q * _log_mixture_ratio(log_p - log_q, beta, log_beta, log_rest)
        over_m = _log_mixture_ratio(log_q - log_p, 1.0 - beta, log_rest, log_beta)
        value = beta * p * over_m + (1.0 - beta) * inner
    else:
        value = p * _log_mixture_ratio(log_q - log_p, 1.0 - beta, log_rest, log_beta)
        inner = p * tl.sigmoid(log_q - log_p + (log_rest - log_beta))
    return value, inner


@triton.jit
def _slope(log_q, log_p, total, beta, log_beta, log_rest, KIND: tl.constexpr):
    # d divergence / d u, without T^2.
    q = tl.exp(log_q)
    if KIND == FORWARD:
        slope = q - tl.exp(log_p)
    elif KIND == REVERSE:
        slope = q * (log_q - log_p - total)
    elif KIND == JENSEN_SHANNON:
        over_m = _log_mixture_ratio(log_p - log_q, beta, log_beta, log_rest)
        slope = (1.0 - beta) * q * (over_m - total)
    else:
        share = tl.sigmoid(log_q - log_p + (log_rest - log_beta))
        slope = q * total - tl.exp(log_p) * share
    return slope


@triton.jit
def loss_rows(
    student, teacher, labels, supervised, divergence, gradient,  # pointers
    student_stride, teacher_stride, gradient_stride, width,
    alpha, temperature, beta, log_beta, log_rest, scale, limit,
    KIND: tl.constexpr, TEMPERED: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Cross entropy and divergence of each row, and the gradient of their weighted sum.

    KIND 0 has no teacher. TEMPERED: T is not 1. SUMS: pass 2 is needed. The gradient is multiplied
    by `scale` and limited to +-`limit`; it may overwrite the student's logits.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    lane = tl.arange(0, BLOCK)

    # Loaded first: another warp may be in pass 3 already, where it overwrites the logits.
    label = tl.load(labels + row)
    labelled = label != NO_LABEL
    # A label that is no column makes the loss NaN, so that it cannot go unnoticed.
    exists = (label >= 0) & (label < width)
    logit = tl.load(student + label, mask=labelled & exists, other=float("nan")).to(tl.float32)

    # Pass 1: log sum exp of the student at temperature 1, of student and teacher at T.
    high_1 = tl.full([BLOCK], LOWEST, tl.float32)
    high_q = tl.full([BLOCK], LOWEST, tl.float32)
    high_p = tl.full([BLOCK], LOWEST, tl.float32)
    sum_1 = tl.zeros([BLOCK], tl.float32)
    sum_q = tl.zeros([BLOCK], tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lane
        valid = column < width
        raw, u, v = _pair(student, teacher, column, valid, temperature)
        high_1, sum_1 = _running_sum(high_1, sum_1, _clamp(raw, -LIMIT, LIMIT), valid)
        if TEMPERED:
            high_q, sum_q = _running_sum(high_q, sum_q, u, valid)
        if KIND != 0:
            high_p, sum_p = _running_sum(high_p, sum_p, v, valid)
    max_1, log_1 = _combine(high_1, sum_1)
    max_q = max_1
    log_q_sum = log_1
    if TEMPERED:
        max_q, log_q_sum = _combine(high_q, sum_q)
    max_p = max_1
    log_p_sum = log_1
    if KIND != 0:
        max_p, log_p_sum = _combine(high_p, sum_p)

    tl.store(supervised + row, tl.where(labelled, log_1 - (logit - max_1), 0.0))

    # Pass 2: sums over the row; the forward KL's gradient needs none, its value comes in pass 3.
    value_sum = tl.zeros([BLOCK], tl.float32)
    inner_sum = tl.zeros([BLOCK], tl.float32)
    if SUMS:
        for start in range(0, width, BLOCK):
            column = start + lane
            valid = column < width
            raw, u, v = _pair(student, teacher, column, valid, temperature)
            log_q = (u - max_q) - log_q_sum
            log_p = (v - max_p) - log_p_sum
            value, inner = _terms(log_q, log_p, beta, log_beta, log_rest, KIND)
            value_sum += tl.where(valid, value, 0.0)
            inner_sum += tl.where(valid, inner, 0.0)
    total = tl.sum(inner_sum, 0)

    # Pass 3: the gradient.
    if GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + lane
            valid = column < width
            raw, u, v = _pair(student, teacher, column, valid, temperature)
            wrong = tl.exp((_clamp(raw, -LIMIT, LIMIT) - max_1) - log_1)
            wrong -= tl.where(column == label, 1.0, 0.0)
            slope = alpha * tl.where(labelled, wrong, 0.0)
            if KIND != 0:
                log_q = (u - max_q) - log_q_sum
                log_p = (v - max_p) - log_p_sum
                if KIND == FORWARD:
                    value, inner = _terms(log_q, log_p, beta, log_beta, log_rest, KIND)
                    value_sum += tl.where(valid, value, 0.0)
                part = _slope(log_q, log_p, total, beta, log_beta, log_rest, KIND)
                inside = ~(tl.abs(raw) > LIMIT)
                slope += (1.0 - alpha) * temperature * tl.where(inside, part, 0.0)
            slope = _clamp(slope * scale, -limit, limit)
            tl.store(gradient + column, slope.to(gradient.dtype.element_ty), mask=valid)
    if KIND != 0:
        tl.store(divergence + row, temperature * temperature * tl.sum(value_sum, 0))
