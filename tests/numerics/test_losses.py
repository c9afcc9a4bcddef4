"""Laws of the losses; a new one is a row of DIVERGENCES, or of SUPERVISED if against labels."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from distill import losses

N, C = 7, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Divergence(NamedTuple):
    function: Callable[..., Tensor]
    reference: Callable[
        [Tensor, Tensor], Tensor
    ]  # of student and teacher logits that T already divides, without T^2
    smooth: bool = True  # differentiable everywhere


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return kl_divergence(Categorical(probs=p), Categorical(probs=q))


def _jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixture = beta * p + (1 - beta) * q
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _skew(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return _kl(p, beta * p + (1 - beta) * q)


DIVERGENCES = {
    "forward_kl": Divergence(
        losses.forward_kl, lambda s, t: kl_divergence(Categorical(logits=t), Categorical(logits=s))
    ),
    "reverse_kl": Divergence(
        losses.reverse_kl, lambda s, t: kl_divergence(Categorical(logits=s), Categorical(logits=t))
    ),
    "jensen_shannon": Divergence(losses.jensen_shannon, partial(_jensen_shannon, beta=0.5)),
    "jensen_shannon_0.1": Divergence(
        partial(losses.jensen_shannon, beta=0.1), partial(_jensen_shannon, beta=0.1)
    ),
    "jensen_shannon_0.9": Divergence(
        partial(losses.jensen_shannon, beta=0.9), partial(_jensen_shannon, beta=0.9)
    ),
    "skew_kl": Divergence(losses.skew_kl, partial(_skew, beta=0.5)),
    "skew_kl_0.1": Divergence(partial(losses.skew_kl, beta=0.1), partial(_skew, beta=0.1)),
    "total_variation": Divergence(
        losses.total_variation,
        lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2,
        smooth=False,
    ),
    "logit_mse": Divergence(losses.logit_mse, lambda s, t: (s - t).pow(2).mean(-1)),
    "sigmoid_kl": Divergence(
        losses.sigmoid_kl,
        lambda s, t: kl_divergence(Bernoulli(logits=t), Bernoulli(logits=s)).mean(-1),
    ),
}
DIVERGENCE = pytest.mark.parametrize("law", DIVERGENCES.values(), ids=DIVERGENCES.keys())


class Supervised(NamedTuple):
    function: Callable[..., Tensor]
    labels: Tensor  # of N rows
    missing: float  # the label of a row without one
    reference: Callable[[Tensor, Tensor], Tensor]


SUPERVISED = {
    "cross_entropy": Supervised(
        losses.cross_entropy,
        torch.tensor([0, 1, 2, 3, 4, 0, 1]),
        -100,
        lambda x, y: -Categorical(logits=x).log_prob(y.clamp(min=0)),
    ),
    "binary_cross_entropy": Supervised(
        losses.binary_cross_entropy,
        torch.arange(N * C).reshape(N, C).remainder(3).eq(0).double(),
        math.nan,
        lambda x, y: -Bernoulli(logits=x).log_prob(y.nan_to_num()).mean(-1),
    ),
    "squared_error": Supervised(
        losses.squared_error,
        torch.linspace(-2, 2, N * C).reshape(N, C).double(),
        math.nan,
        lambda x, y: (x - y.nan_to_num()).pow(2).mean(-1),
    ),
}
LABELS = pytest.mark.parametrize("law", SUPERVISED.values(), ids=SUPERVISED.keys())


def logits(
    seed: int,
    rows: int = N,
    classes: int = C,
    dtype: torch.dtype = torch.float64,
    scale: float = 3.0,
) -> Tensor:
    return (
        scale
        * torch.randn(
            rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    ).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(at).sum(), at)
    return grad


def extremes(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every pairing of rows that are one-hot, flat, tied or far apart, up to +-1e4."""
    rows = torch.tensor(
        [
            [1e4, -1e4, 0],
            [-1e4, 1e4, 0],
            [0, 0, 0],
            [1e4, 1e4, -1e4],
            [-1e4, -1e4, -1e4],
            [1, 2, 3],
        ],
        dtype=dtype,
    )
    return rows.repeat_interleave(len(rows), 0), rows.repeat(len(rows), 1)


def test_every_divergence_has_a_row():
    named = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if {"teacher_NC", "temperature"} <= inspect.signature(function).parameters.keys()
    }
    assert {name for name in named if not name.startswith("_")} <= DIVERGENCES.keys()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_largest_logits_give_no_nan(name, dtype):
    largest = torch.finfo(dtype).max
    rows = torch.tensor(
        [[1.0, -math.inf, 2.0], [largest, -largest, 0.0], [-math.inf, 0.0, largest]], dtype=dtype
    )
    student, teacher = rows.repeat_interleave(3, 0), rows.repeat(3, 1)
    function = DIVERGENCES[name].function
    assert function(student, teacher, 1.0).isfinite().all()
    assert function(rows, rows.clone(), 1.0).eq(0).all()
    assert (
        not gradient(lambda at: function(at, teacher, 1.0), student).isnan().any()
    )  # in fp16 a true gradient may overflow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [-math.inf, math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_the_squared_error_of_the_other_logits_is_that_without_a_mask(masked, mask, dtype):
    if dtype == torch.float16 and math.isfinite(mask):
        mask = -math.inf  # beyond the range of float16
    student, teacher = logits(1, dtype=dtype), logits(2, dtype=dtype)
    both = {"student": student.clone(), "teacher": teacher.clone()}
    both[masked][:, 1] = mask
    others = [index for index in range(C) if index != 1]
    value = losses.logit_mse(both["student"], both["teacher"], 2.0)
    expected = losses.logit_mse(student[:, others], teacher[:, others], 2.0) * len(others) / C
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    grad = gradient(lambda x: losses.logit_mse(x, both["teacher"], 2.0), both["student"])
    assert grad.isfinite().all()
    assert grad[:, 1].eq(0).all()
    assert grad[:, others].abs().min() > 0


# ---- each divergence


@DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_the_textbook_formula_times_temperature_squared(law, temperature):
    student, teacher = logits(1), logits(2)
    expected = temperature**2 * law.reference(student / temperature, teacher / temperature)
    torch.testing.assert_close(
        law.function(student, teacher, temperature), expected, rtol=1e-10, atol=1e-12
    )


@DIVERGENCE
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_divergence_of_equal_logits_is_exactly_zero_with_zero_gradient(law, dtype, temperature):
    same = torch.cat([logits(3, 64, 1000, dtype), logits(4, 64, 1000, dtype, scale=1e3)])
    assert law.function(same, same.clone(), temperature).eq(0).all()
    assert (
        gradient(lambda student: law.function(student, same, temperature), same).abs().max() < 1e-6
    )


@DIVERGENCE
@pytest.mark.parametrize("distance", [3.0, 1e-2, 1e-5])
def test_divergence_is_not_negative(law, distance):
    student = logits(5, 500)
    teacher = student + distance * logits(6, 500)
    assert law.function(student, teacher, 1.0).min() >= -1e-14
    assert law.function(student.float(), teacher.float(), 1.0).min() >= -1e-6


@DIVERGENCE
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_gradient_is_right(law, temperature):
    student, teacher = logits(7).requires_grad_(), logits(8)
    assert torch.autograd.gradcheck(lambda x: law.function(x, teacher, temperature), student)
    if law.smooth:
        teacher = torch.where(torch.arange(C) < 2, student.detach(), teacher)  # ties
        assert torch.autograd.gradcheck(lambda x: law.function(x, teacher, temperature), student)


@DIVERGENCE
def test_divergence_gives_the_teacher_no_gradient(law):
    student, teacher = logits(9).requires_grad_(), logits(10).requires_grad_()
    law.function(student, teacher, 2.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@DIVERGENCE
def test_divergence_treats_each_row_alone(law):
    student, teacher = logits(11), logits(12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    values = law.function(student, teacher, 2.0)
    assert values.shape == (N,)
    torch.testing.assert_close(
        law.function(student[order], teacher[order], 2.0), values[order], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        torch.cat([law.function(student[i : i + 1], teacher[i : i + 1], 2.0) for i in range(N)]),
        values,
        rtol=1e-12,
        atol=0,
    )


@DIVERGENCE
def test_divergence_does_not_depend_on_the_order_of_the_classes(law):
    student, teacher, order = logits(13), logits(14), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        law.function(student[:, order], teacher[:, order], 2.0),
        law.function(student, teacher, 2.0),
        rtol=1e-12,
        atol=0,
    )


@DIVERGENCE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_finite_at_extreme_logits_in_value_and_gradient(law, dtype, temperature):
    student, teacher = extremes(dtype)
    values = law.function(student, teacher, temperature)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert values.min() >= -1e-6
    grad = gradient(lambda x: law.function(x, teacher, temperature), student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@DIVERGENCE
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_is_computed_in_float32_whatever_comes_in(law, dtype):
    student, teacher = logits(15, dtype=dtype), logits(16, dtype=dtype)
    assert law.function(student, teacher, 2.0).equal(
        law.function(student.float(), teacher.float(), 2.0)
    )
    assert law.function(logits(15), logits(16), 2.0).dtype == torch.float64


@DIVERGENCE
def test_divergence_of_no_rows_is_empty_and_attached(law):
    student = logits(17, rows=0).requires_grad_()
    total = losses.mean_over(law.function(student, logits(17, rows=0), 2.0), 0)
    total.backward()
    assert total == 0
    assert student.grad is not None
    assert student.grad.shape == (0, C)


# ---- what the divergences tend to


def test_forward_kl_at_high_temperature_is_half_the_squared_error_of_centred_logits():
    student, teacher = logits(20), logits(21)
    centred = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    for divergence in (losses.forward_kl, losses.reverse_kl):
        torch.testing.assert_close(
            divergence(student, teacher, 1e4), centred.square().sum(-1) / (2 * C), rtol=2e-3, atol=0
        )


@pytest.mark.parametrize(
    ("limit", "scaled"),
    [
        (losses.forward_kl, lambda s, t, eps: losses.jensen_shannon(s, t, 2.0, beta=eps) / eps),
        (losses.reverse_kl, lambda s, t, eps: losses.jensen_shannon(s, t, 2.0, beta=1 - eps) / eps),
        (losses.forward_kl, lambda s, t, eps: losses.skew_kl(s, t, 2.0, beta=eps)),
    ],
    ids=["jensen_shannon_to_forward_kl", "jensen_shannon_to_reverse_kl", "skew_kl_to_forward_kl"],
)
def test_mixture_divergences_tend_to_the_kl_at_their_ends(limit, scaled):
    student, teacher = logits(22), logits(23)
    errors = [
        (scaled(student, teacher, eps) / limit(student, teacher, 2.0) - 1).abs().max().item()
        for eps in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_divergences_are_finite_and_continuous_at_their_ends(dtype):
    student, teacher = extremes(dtype)
    for beta in (0, 1e-300, 1e-12, 1 - 1e-12, 1):
        for divergence in (
            partial(losses.jensen_shannon, beta=beta),
            partial(losses.skew_kl, beta=beta),
        ):
            assert divergence(student, teacher, 1.0).isfinite().all()
            assert gradient(lambda x, d=divergence: d(x, teacher, 1.0), student).isfinite().all()
    torch.testing.assert_close(
        losses.skew_kl(student, teacher, 2.0, beta=0), losses.forward_kl(student, teacher, 2.0)
    )
    for beta in (0, 1):
        assert losses.jensen_shannon(logits(24), logits(25), 2.0, beta=beta).abs().max() < 1e-15


def test_bounds_of_jensen_shannon_and_total_variation_are_reached_by_opposite_certainty():
    student, teacher = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    assert losses.jensen_shannon(student, teacher, 1.0).item() == pytest.approx(math.log(2))
    assert losses.total_variation(student, teacher, 1.0).item() == pytest.approx(1)
    assert losses.jensen_shannon(logits(26), logits(27), 1.0).max() < math.log(2)
    assert losses.total_variation(logits(26), logits(27), 1.0).max() < 1


def test_jensen_shannon_swaps_models_with_beta():
    student, teacher = logits(28), logits(29)
    torch.testing.assert_close(
        losses.jensen_shannon(student, teacher, 2.0, beta=0.3),
        losses.jensen_shannon(teacher, student, 2.0, beta=0.7),
    )


# ---- against labels


def _with_missing(law: Supervised) -> tuple[Tensor, Tensor]:
    """Labels whose rows 2 and 5 are missing, and the mask of those."""
    labels, missing = law.labels.clone(), torch.zeros(N, dtype=torch.bool)
    missing[[2, 5]] = True
    labels[missing] = torch.tensor(law.missing).to(labels.dtype)
    return labels, missing


@LABELS
def test_supervised_is_the_textbook_formula_and_zero_without_label(law):
    labels, missing = _with_missing(law)
    values = law.function(logits(30), labels)
    torch.testing.assert_close(
        values[~missing], law.reference(logits(30), labels)[~missing], rtol=1e-10, atol=1e-12
    )
    assert values[missing].eq(0).all()


@LABELS
def test_supervised_gradient_is_right_and_zero_without_label(law):
    labels, missing = _with_missing(law)
    assert torch.autograd.gradcheck(lambda x: law.function(x, labels), logits(31).requires_grad_())
    assert gradient(lambda x: law.function(x, labels), logits(31))[missing].eq(0).all()


@LABELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_supervised_is_finite_at_extreme_logits(law, dtype):
    labels, _ = _with_missing(law)
    extreme = (1e4 * logits(32).sign()).to(dtype)
    values = law.function(extreme, labels)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert gradient(lambda x: law.function(x, labels), extreme).isfinite().all()


@LABELS
def test_supervised_of_no_rows_is_empty_and_attached(law):
    student = logits(33, rows=0).requires_grad_()
    total = losses.mean_over(law.function(student, law.labels[:0]), 0)
    total.backward()
    assert total == 0
    assert student.grad is not None


def test_one_missing_label_of_many_silences_its_row():
    labels = torch.zeros(2, C).double()
    labels[0, 3] = math.nan
    for function in (losses.binary_cross_entropy, losses.squared_error):
        values, grad = (
            function(logits(34, rows=2), labels),
            gradient(lambda x, f=function: f(x, labels), logits(34, rows=2)),
        )
        assert values[0] == 0
        assert values[1] > 0
        assert grad[0].eq(0).all()
        assert grad[1].ne(0).all()


# ---- alpha, and the mean over the global batch


@DIVERGENCE
def test_alpha_is_continuous_at_both_ends_with_the_temperature_in_place(law):
    student, teacher, labels = logits(40), logits(41), torch.arange(N) % C
    hard, soft = losses.cross_entropy(student, labels), law.function(student, teacher, 4.0)
    assert losses.distillation(hard, soft, 0).equal(soft)
    assert losses.distillation(hard, soft, 1).equal(hard)
    torch.testing.assert_close(losses.distillation(hard, soft, 1e-12), soft, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        losses.distillation(hard, soft, 1 - 1e-12), hard, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(losses.distillation(hard, soft, 0.3), 0.3 * hard + 0.7 * soft)


@pytest.mark.parametrize("parts", [[7], [3, 4], [1, 6], [0, 7], [2, 0, 4, 1], [1] * 7])
@DIVERGENCE
def test_split_over_micro_batches_or_ranks_changes_neither_loss_nor_gradient(law, parts):
    student, teacher, labels = logits(42).requires_grad_(), logits(43), torch.arange(N) % C

    def loss(rows: Tensor) -> Tensor:
        hard, soft = (
            losses.cross_entropy(student[rows], labels[rows]),
            law.function(student[rows], teacher[rows], 2.0),
        )
        return losses.mean_over(losses.distillation(hard, soft, 0.5), N)

    full, split = (
        loss(torch.arange(N)),
        torch.stack([loss(rows) for rows in torch.arange(N).split(parts)]).sum(),
    )
    torch.testing.assert_close(split, full, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student)[0] for value in (split, full)),
        rtol=1e-12,
        atol=1e-15,
    )


def test_mean_over_a_whole_batch_is_the_mean():
    torch.testing.assert_close(losses.mean_over(logits(44)[:, 0], N), logits(44)[:, 0].mean())
