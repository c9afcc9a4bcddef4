"""Losses: rows of logits -> one value per row, in nats.

    loss = mean_over(alpha * cross_entropy + (1 - alpha) * T^2 * KL(teacher || student), rows)

N = rows: examples, or predicted tokens; C = classes or vocabulary;
B = examples, L = tokens of the longest, H = heads, D = width.

Values are computed in float32, whatever the dtype of the logits; float64 stays float64. Every
comparison with a teacher is 0 where student and teacher are equal, is minimal there, and passes no
gradient to the teacher.

Divergences take (student_NC, teacher_NC, temperature) and return (N,). They divide the logits by
the temperature T and carry the factor T^2, which keeps the gradient of a KL about as large at every
T (Hinton et al. 2015, section 2). Below, p is the teacher's distribution softmax(teacher / T), and
q is the student's, softmax(student / T).
"""

import torch
from torch import Tensor, nn

from distill.losses.products import at_least_float32

IGNORED = -100  # class label of a row without a label
MAX_DIFFERENCE = 1e15  # between finite logits: the squares of larger ones overflow
MAX_LOGIT = 1e30  # logits are clamped to +-MAX_LOGIT: the -inf of a vocabulary mask would give NaN

# Divergences for each kind of logits; the first is the default.
ONE_OF_C = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation", "logit_mse")
ANY_OF_C = ("sigmoid_kl", "logit_mse")
NUMBERS = ("logit_mse",)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in one dtype and clamped, the teacher's without gradient."""
    assert student.shape == teacher.shape, (
        f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ: "
        "broadcasting would hide it"
    )
    student = at_least_float32(student).clamp(-MAX_LOGIT, MAX_LOGIT)
    return student, teacher.detach().to(student.dtype).clamp(-MAX_LOGIT, MAX_LOGIT)


# ---- against labels


def cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """-log softmax(logits)[label], (N,); 0 where the label is -100."""
    return nn.functional.cross_entropy(
        at_least_float32(logits_NC), labels_N, ignore_index=IGNORED, reduction="none"
    )


def binary_cross_entropy(
    logits_NC: Tensor, labels_NC: Tensor, weights_C: Tensor | None = None
) -> Tensor:
    """-w y log sigmoid(x) - (1 - y) log sigmoid(-x), mean over C, (N,); without weights, w = 1.

    0 for rows with NaN labels.
    """
    logits_NC, labels_NC = _pair(logits_NC, labels_NC)
    missing_NC = labels_NC.isnan()
    values_NC = nn.functional.binary_cross_entropy_with_logits(
        logits_NC, labels_NC.masked_fill(missing_NC, 0), pos_weight=weights_C, reduction="none"
    )
    return values_NC.mean(-1).masked_fill(missing_NC.any(-1), 0)


def squared_error(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """(logit - label)^2, mean over C, (N,), in squared units of the label.

    0 for rows with NaN labels.
    """
    logits_NC, labels_NC = _pair(logits_NC, labels_NC)
    missing_NC = labels_NC.isnan()
    values_NC = (logits_NC - labels_NC.masked_fill(missing_NC, 0)).square()
    return values_NC.mean(-1).masked_fill(missing_NC.any(-1), 0)


# ---- against the teacher's logits: (student, teacher, temperature) -> (N,)


def _log_softmax(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    student_NC, teacher_NC = _pair(student_NC, teacher_NC)
    return (student_NC / temperature).log_softmax(-1), (teacher_NC / temperature).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p || q), which is mode-covering (Hinton et al. 2015)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(q || p), which is mode-seeking (MiniLLM, Gu et al. 2024)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * _kl(log_q, log_p)


def _log_mixture_ratio(gap: Tensor, weight: float) -> Tensor:
    """-log(1 - weight + weight * exp(gap)).

    Exactly 0 at gap 0, and finite for any finite gap and any weight in [0, 1].
    """
    near = (weight * gap.clamp(-1, 1).expm1()).log1p()
    log_weight, log_rest = gap.new_full((), weight).log(), gap.new_full((), 1 - weight).log()
    return -torch.where(gap.abs() < 1, near, torch.logaddexp(gap + log_weight, log_rest))


def jensen_shannon(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float, beta: float = 0.5
) -> Tensor:
    """T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)), with m = beta * p + (1 - beta) * q.

    At most T^2 log 2. Divided by beta it tends to forward_kl as beta -> 0, divided by 1 - beta to
    reverse_kl as beta -> 1. Source: GKD, Agarwal et al. 2024.
    """
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    log_p_over_m = _log_mixture_ratio(log_q - log_p, 1 - beta)
    log_q_over_m = _log_mixture_ratio(log_p - log_q, beta)
    return temperature**2 * (
        beta * log_p.exp() * log_p_over_m + (1 - beta) * log_q.exp() * log_q_over_m
    ).sum(-1)


def skew_kl(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float, beta: float = 0.5
) -> Tensor:
    """T^2 * KL(p || m), with m = beta * p + (1 - beta) * q.

    forward_kl at beta = 0, else at most -T^2 log beta. Source: DistiLLM, Ko et al. 2024.
    """
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * (log_p.exp() * _log_mixture_ratio(log_q - log_p, 1 - beta)).sum(-1)


def total_variation(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * sum |p - q| / 2, in [0, T^2]; a probability, not nats (f-distill, Wen et al. 2023)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def logit_mse(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * (student / T - teacher / T)^2, mean over C, in squared logits; T cancels.

    A logit that is infinite in one model, as a mask makes it, counts as 0: no finite logit is near
    it, and its square would hide all others. Source: Ba and Caruana 2014.
    """
    student_NC, teacher_NC = _pair(student_NC, teacher_NC)
    difference_NC = student_NC - teacher_NC
    return difference_NC.masked_fill(difference_NC.abs() > MAX_DIFFERENCE, 0).square().mean(-1)


def sigmoid_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between Bernoulli(sigmoid(teacher / T)) and that of the student, mean over C."""
    student_NC, teacher_NC = (logits / temperature for logits in _pair(student_NC, teacher_NC))
    log_q, log_p = (
        torch.stack([nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)], -1)
        for logits in (student_NC, teacher_NC)
    )
    return temperature**2 * _kl(log_p, log_q).mean(-1)


def sparse_kl(
    student_NC: Tensor,
    temperature: float,
    ids_NK: Tensor,
    probs_NK: Tensor,
    entropy_N: Tensor,
    tail_N: Tensor | None = None,
) -> Tensor:
    """T^2 * (sum_k probs_k * -log q_k - entropy): forward_kl from the probabilities of K tokens.

    If the expectation of the probabilities is p and the entropy is that of p, value and gradient
    are unbiased estimates of those of forward_kl; a single value may be negative. With the entropy
    of the probabilities themselves, this is T^2 * KL(probs || q).

    With `tail_N` all other tokens are one class: T^2 * KL of K + 1 classes, which is at most
    forward_kl, and equal to it where the student divides the tail as the teacher does.

    Args:
        student_NC: Logits.
        temperature: T.
        ids_NK: Tokens.
        probs_NK: Their probabilities, sum 1 over K, or with the tail.
        entropy_N: Nats.
        tail_N: Probability of all other tokens, none of which is in `ids_NK`; None: there is none.

    Returns:
        (N,).
    """
    log_q = (at_least_float32(student_NC).clamp(-MAX_LOGIT, MAX_LOGIT) / temperature).log_softmax(
        -1
    )
    crossed_N = -(probs_NK * log_q.gather(-1, ids_NK)).sum(-1)
    if tail_N is not None:
        log_tail_N = log_q.scatter(-1, ids_NK, -MAX_LOGIT).logsumexp(-1)
        crossed_N = crossed_N - tail_N * log_tail_N
    return temperature**2 * (crossed_N - entropy_N)


# ---- combining rows


def distillation(label_loss_N: Tensor, divergence_N: Tensor, alpha: float) -> Tensor:
    """alpha * label loss + (1 - alpha) * divergence, (N,)."""
    return alpha * label_loss_N + (1 - alpha) * divergence_N


def mean_over(values: Tensor, normalizer: float) -> Tensor:
    """sum(values) / normalizer.

    With the rows of the global batch as the normalizer, the results of all micro-batches and ranks
    add up to the mean over the global batch. Without rows the result and its gradient are 0.
    """
    return values.sum() / max(normalizer, 1)


# ---- inside the models: (student, teacher, mask) -> (B, L), 0 at padding


def hidden_mse(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """(student - teacher)^2, mean over D, (B, L) (TinyBERT, Jiao et al. 2020)."""
    student_BLD, teacher_BLD = _pair(student_BLD, teacher_BLD)
    return (student_BLD - teacher_BLD).masked_fill(~mask_BL.bool()[..., None], 0).square().mean(-1)


def hidden_cosine(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """1 - cos(student, teacher), (B, L) (DistilBERT, Sanh et al. 2019).

    Computed as |student / |student| - teacher / |teacher||^2 / 2, which is exactly 0 where both are
    equal.
    """
    student_BLD, teacher_BLD = (
        nn.functional.normalize(hidden, dim=-1) for hidden in _pair(student_BLD, teacher_BLD)
    )
    return (student_BLD - teacher_BLD).masked_fill(~mask_BL.bool()[..., None], 0).square().sum(
        -1
    ) / 2


def _log_relations(heads_BHLD: Tensor, mask_BL: Tensor) -> Tensor:
    """log softmax(x x^T / sqrt(D)) over the tokens that are not padding, (B, H, L, L)."""
    scores_BHLL = heads_BHLD @ heads_BHLD.mT / heads_BHLD.shape[-1] ** 0.5
    lowest = torch.finfo(scores_BHLL.dtype).min  # not -inf, whose differences are NaN
    return scores_BHLL.masked_fill(~mask_BL.bool()[:, None, None, :], lowest).log_softmax(-1)


def relation_kl(student_BHLD: Tensor, teacher_BHLD: Tensor, mask_BL: Tensor) -> Tensor:
    """KL(teacher || student) between the relations of each token to all tokens, mean over H.

    The relations are softmax(x x^T / sqrt(D)), where x is the queries, keys or values of a layer
    (MiniLMv2, Wang et al. 2021).

    Args:
        student_BHLD: x of the student, split into H relation heads; its D may differ.
        teacher_BHLD: x of the teacher, split into H relation heads.
        mask_BL: 0 at padding.

    Returns:
        (B, L).
    """
    student_BHLD = at_least_float32(student_BHLD)
    log_p = _log_relations(teacher_BHLD.detach().to(student_BHLD.dtype), mask_BL)
    log_q = _log_relations(student_BHLD, mask_BL)
    return _kl(log_p, log_q).mean(1).masked_fill(~mask_BL.bool(), 0)
