"""Laws of the losses of hidden states and attention relations; a new one is a row of INSIDES."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from distill import losses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, L, H, D = 3, 6, 2, 4
MASK = torch.arange(L) < torch.tensor([[6], [4], [1]])


def states(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(at).sum(), at)
    return grad


INSIDES = pytest.mark.parametrize(
    ("function", "shape", "padded"),
    [
        (losses.hidden_mse, (B, L, D), lambda x: x),
        (losses.hidden_cosine, (B, L, D), lambda x: x),
        (losses.relation_kl, (B, H, L, D), lambda x: x.transpose(1, 2)),  # (B, L, H, D)
    ],
    ids=["hidden_mse", "hidden_cosine", "relation_kl"],
)


@INSIDES
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_insides_of_equal_models_are_exactly_zero(function, shape, padded, dtype):
    same = states(50, *shape, dtype=dtype)
    assert function(same, same.clone(), MASK).eq(0).all()
    assert gradient(lambda x: function(x, same, MASK), same).abs().max() < 1e-6


@INSIDES
def test_insides_are_positive_at_tokens_and_zero_at_padding(function, shape, padded):
    values = function(states(51, *shape), states(52, *shape), MASK)
    alone = torch.tensor(
        [[False] * L, [False] * L, [True] + [False] * (L - 1)]
    )  # a token's relation to itself alone is 1 in both models
    assert values.shape == (B, L)
    assert values[~MASK].eq(0).all()
    assert values[MASK & ~alone].gt(0).all()


@INSIDES
def test_insides_gradient_is_right_for_the_student_and_absent_for_the_teacher(
    function, shape, padded
):
    student, teacher = states(53, *shape).requires_grad_(), states(54, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, teacher.detach(), MASK), student)
    function(student, teacher, MASK).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert padded(student.grad)[~MASK].eq(0).all()


@INSIDES
def test_values_at_padding_change_nothing(function, shape, padded):
    student, teacher = states(55, *shape), states(56, *shape)
    dirty_student, dirty_teacher = student.clone(), teacher.clone()
    padded(dirty_student)[~MASK], padded(dirty_teacher)[~MASK] = 1e3, -7.0
    assert function(dirty_student, dirty_teacher, MASK).equal(function(student, teacher, MASK))
    assert gradient(lambda x: function(x, dirty_teacher, MASK), dirty_student).equal(
        gradient(lambda x: function(x, teacher, MASK), student)
    )


@INSIDES
def test_more_padding_changes_nothing(function, shape, padded):
    student, teacher = states(57, *shape), states(58, *shape)
    longer = [torch.cat([x, torch.ones_like(x)], dim=-2) for x in (student, teacher)]
    values = function(*longer, torch.cat([MASK, torch.zeros_like(MASK)], dim=1))
    torch.testing.assert_close(
        values[:, :L], function(student, teacher, MASK), rtol=1e-12, atol=1e-14
    )
    assert values[:, L:].eq(0).all()


@INSIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_insides_are_finite_at_extreme_values_and_full_padding(function, shape, padded, dtype):
    student, teacher = (
        (1e4 * states(59, *shape).sign()).to(dtype),
        (1e4 * states(60, *shape).sign()).to(dtype),
    )
    mask = MASK & torch.tensor([[True], [False], [True]])
    values = function(student, teacher, mask)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert (
        gradient(lambda x: losses.mean_over(function(x, teacher, mask), 9), student)
        .isfinite()
        .all()
    )


def test_hidden_distances_are_the_textbook_formulas():
    student, teacher, everything = states(61, B, L, D), states(62, B, L, D), torch.ones(B, L)
    torch.testing.assert_close(
        losses.hidden_mse(student, teacher, everything), (student - teacher).pow(2).mean(-1)
    )
    torch.testing.assert_close(
        losses.hidden_cosine(student, teacher, everything),
        1 - torch.cosine_similarity(student, teacher, dim=-1),
    )


def test_hidden_cosine_sees_directions_only():
    student, teacher = states(63, B, L, D), states(64, B, L, D)
    torch.testing.assert_close(
        losses.hidden_cosine(3 * student, 0.1 * teacher, MASK),
        losses.hidden_cosine(student, teacher, MASK),
    )


def test_relations_are_the_textbook_formula():
    student, teacher = states(65, B, H, L, D), states(66, B, H, L, D)
    values = losses.relation_kl(student, teacher, MASK)
    for example, length in enumerate(MASK.sum(1).tolist()):
        q, p = (
            x[example, :, :length] @ x[example, :, :length].mT / math.sqrt(D)
            for x in (student, teacher)
        )
        expected = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean(0)
        torch.testing.assert_close(values[example, :length], expected, rtol=1e-10, atol=1e-14)


def test_relations_do_not_depend_on_rotation_or_need_equal_widths():
    student, teacher = states(67, B, H, L, D), states(68, B, H, L, D)
    rotation = torch.linalg.qr(states(69, D, D)).Q
    torch.testing.assert_close(
        losses.relation_kl(student @ rotation, teacher, MASK),
        losses.relation_kl(student, teacher, MASK),
    )
    wider = (
        torch.cat([teacher, torch.zeros_like(teacher)], -1) * 2**0.25
    )  # twice the width, with the scores unchanged
    torch.testing.assert_close(
        losses.relation_kl(student, wider, MASK), losses.relation_kl(student, teacher, MASK)
    )
