"""Every loss as a pure function: rows of logits -> one value a row, in nats.

    loss = mean_over(alpha * cross_entropy + (1 - alpha) * T^2 * KL(teacher || student), rows of the global batch)

N = rows that count: examples, or predicted tokens; C = classes or vocabulary;
B = examples, L = tokens of the longest, H = heads, D = width.
Whatever the dtype of the logits, values are computed in float32 (float64 stays float64). Everything that compares a student with
a teacher is exactly 0 where the two are equal, is minimal there, and passes no gradient to the teacher.

Divergences divide the logits by the temperature T and carry the factor T^2, which keeps a KL's gradient about as large at every
T (Hinton et al. 2015, section 2). Below, p is the teacher's distribution softmax(teacher / T) and q is softmax(student / T).
"""

import torch
from torch import Tensor, nn

IGNORED = -100  # class label of a row without label
MAX_LOGIT = 1e30  # logits beyond it, such as the -inf of a vocabulary mask, count as it: sums of finite numbers stay finite

# The divergences below, by the kind of logits that they suit; the first is the default.
ONE_OF_C = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation", "logit_mse")
ANY_OF_C = ("sigmoid_kl", "logit_mse")
NUMBERS = ("logit_mse",)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    assert student.shape == teacher.shape, (
        f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ: broadcasting would hide it"
    )
    student = _at_least_float32(student).clamp(-MAX_LOGIT, MAX_LOGIT)
    return student, teacher.detach().to(student.dtype).clamp(-MAX_LOGIT, MAX_LOGIT)


# ---- against labels


def cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """-log softmax(logits)[label], (N,); 0 where the label is -100."""
    return nn.functional.cross_entropy(
        _at_least_float32(logits_NC), labels_N, ignore_index=IGNORED, reduction="none"
    )


def binary_cross_entropy(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """-y log sigmoid(x) - (1 - y) log sigmoid(-x), mean over C, (N,); 0 where a row has NaN labels."""
    logits_NC, labels_NC = _pair(logits_NC, labels_NC)
    missing_NC = labels_NC.isnan()
    values_NC = nn.functional.binary_cross_entropy_with_logits(
        logits_NC, labels_NC.masked_fill(missing_NC, 0), reduction="none"
    )
    return values_NC.mean(-1).masked_fill(missing_NC.any(-1), 0)


def squared_error(logits_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """(logit - label)^2, mean over C, (N,); 0 where a row has NaN labels. In squared units of the label."""
    logits_NC, labels_NC = _pair(logits_NC, labels_NC)
    missing_NC = labels_NC.isnan()
    values_NC = (logits_NC - labels_NC.masked_fill(missing_NC, 0)).square()
    return values_NC.mean(-1).masked_fill(missing_NC.any(-1), 0)


# ---- against the teacher: (student, teacher, temperature) -> (N,)


def _log_softmax(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    student_NC, teacher_NC = _pair(student_NC, teacher_NC)
    return (student_NC / temperature).log_softmax(-1), (teacher_NC / temperature).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p || q): the student covers all that the teacher holds likely (Hinton et al. 2015)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(q || p): the student avoids what the teacher holds unlikely (MiniLLM, Gu et al. 2024)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * _kl(log_q, log_p)


def _log_share(gap: Tensor, weight: float) -> Tensor:
    """-log(1 - weight + weight * exp(gap)): exactly 0 at gap 0, and finite for any finite gap and any weight in [0, 1]."""
    near = (weight * gap.clamp(-1, 1).expm1()).log1p()
    log_weight, log_rest = gap.new_full((), weight).log(), gap.new_full((), 1 - weight).log()
    return -torch.where(gap.abs() < 1, near, torch.logaddexp(gap + log_weight, log_rest))


def jensen_shannon(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float, beta: float = 0.5
) -> Tensor:
    """T^2 * (beta * KL(p || m) + (1 - beta) * KL(q || m)) with m = beta * p + (1 - beta) * q (GKD, Agarwal et al. 2024).

    At most T^2 log 2, and 0 at both ends: over beta it tends to forward_kl as beta -> 0, over 1 - beta to reverse_kl as beta -> 1.
    """
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    log_p_over_m, log_q_over_m = (
        _log_share(log_q - log_p, 1 - beta),
        _log_share(log_p - log_q, beta),
    )
    return temperature**2 * (
        beta * log_p.exp() * log_p_over_m + (1 - beta) * log_q.exp() * log_q_over_m
    ).sum(-1)


def skew_kl(
    student_NC: Tensor, teacher_NC: Tensor, temperature: float, beta: float = 0.5
) -> Tensor:
    """T^2 * KL(p || m), m = beta * p + (1 - beta) * q: forward_kl at beta = 0, else at most -T^2 log beta (DistiLLM, Ko et al. 2024)."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * (log_p.exp() * _log_share(log_q - log_p, 1 - beta)).sum(-1)


def total_variation(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * sum |p - q| / 2, in [0, T^2] (f-distill, Wen et al. 2023). A probability, not nats."""
    log_q, log_p = _log_softmax(student_NC, teacher_NC, temperature)
    return temperature**2 * (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def logit_mse(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * (student / T - teacher / T)^2, mean over C: T cancels (Ba and Caruana 2014). In squared logits."""
    student_NC, teacher_NC = _pair(student_NC, teacher_NC)
    return (student_NC - teacher_NC).square().mean(-1)


def sigmoid_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(Bernoulli(sigmoid(teacher / T)) || Bernoulli(sigmoid(student / T))), mean over the C labels."""
    student_NC, teacher_NC = (logits / temperature for logits in _pair(student_NC, teacher_NC))
    log_q, log_p = (
        torch.stack([nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)], -1)
        for logits in (student_NC, teacher_NC)
    )
    return temperature**2 * _kl(log_p, log_q).mean(-1)


def sparse_kl(
    student_NC: Tensor, temperature: float, ids_NK: Tensor, shares_NK: Tensor, entropy_N: Tensor
) -> Tensor:
    """T^2 * (sum_k share_k * -log q_k - entropy), (N,): forward_kl where the shares, which add up to 1, stand for p.

    Where they have the expectation p and the entropy is p's, value and gradient have the expectation of forward_kl's; the value alone
    may be below 0. With the entropy of the shares themselves it is the KL from them.
    """
    log_q = (_at_least_float32(student_NC).clamp(-MAX_LOGIT, MAX_LOGIT) / temperature).log_softmax(
        -1
    )
    return temperature**2 * (-(shares_NK * log_q.gather(-1, ids_NK)).sum(-1) - entropy_N)


# ---- putting rows together


def distillation(supervised_N: Tensor, divergence_N: Tensor, alpha: float) -> Tensor:
    """alpha * supervised + (1 - alpha) * divergence, (N,)."""
    return alpha * supervised_N + (1 - alpha) * divergence_N


def mean_over(values: Tensor, normaliser: float) -> Tensor:
    """sum(values) / normaliser, where the normaliser counts the rows of the global batch.

    So the parts of a batch, over micro-batches and ranks, add up to the mean over the whole of it. No rows give 0, with gradient 0.
    """
    return values.sum() / max(normaliser, 1)


# ---- against the teacher's insides: (student, teacher, mask) -> (B, L), 0 at padding


def hidden_mse(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """(student - teacher)^2, mean over D, (B, L) (TinyBERT, Jiao et al. 2020)."""
    student_BLD, teacher_BLD = _pair(student_BLD, teacher_BLD)
    return (student_BLD - teacher_BLD).masked_fill(~mask_BL.bool()[..., None], 0).square().mean(-1)


def hidden_cosine(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """1 - cos(student, teacher) = |student / |student| - teacher / |teacher||^2 / 2, (B, L) (DistilBERT, Sanh et al. 2019)."""
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
    """KL between the relations of each token to all tokens, teacher || student, mean over heads, (B, L) (MiniLMv2, Wang et al. 2021).

    x is the queries, keys or values of a layer, split into the same number of relation heads H for both models; D may differ.
    """
    student_BHLD = _at_least_float32(student_BHLD)
    log_p, log_q = (
        _log_relations(teacher_BHLD.detach().to(student_BHLD.dtype), mask_BL),
        _log_relations(student_BHLD, mask_BL),
    )
    return _kl(log_p, log_q).mean(1).masked_fill(~mask_BL.bool(), 0)
