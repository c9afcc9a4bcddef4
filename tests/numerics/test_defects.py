"""Defects that distillation code is known for; each test fails where its defect is present."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from distill import losses

B, L, C = 4, 9, 11


def _random(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


@pytest.fixture
def student() -> Tensor:
    return _random(1, B * L, C)


@pytest.fixture
def teacher() -> Tensor:
    return _random(2, B * L, C)


def test_kl_is_divided_by_the_number_of_tokens_once(student, teacher):
    truth = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()
    torch.testing.assert_close(
        losses.mean_over(losses.forward_kl(student, teacher, 1.0), B * L), truth
    )


def test_softmax_runs_over_classes_and_not_over_time(student, teacher):
    values = losses.forward_kl(student, teacher, 2.0)
    shift = 10 * _random(
        3, B * L, 1
    )  # a constant for each token: no change over classes, a large one over time
    torch.testing.assert_close(losses.forward_kl(student + shift, teacher - shift, 2.0), values)


def test_temperature_squared_is_kept_at_alpha_zero(student, teacher):
    hard, soft = (
        losses.cross_entropy(student, torch.zeros(B * L, dtype=torch.long)),
        losses.forward_kl(student, teacher, 4.0),
    )
    at_zero = losses.distillation(hard, soft, 0.0)
    torch.testing.assert_close(
        at_zero,
        16 * kl_divergence(Categorical(logits=teacher / 4), Categorical(logits=student / 4)),
    )
    torch.testing.assert_close(losses.distillation(hard, soft, 1e-9), at_zero, rtol=1e-6, atol=1e-6)


def test_temperature_keeps_the_size_of_the_gradient(student, teacher):
    sizes = [
        _gradient(lambda x, t=t: losses.forward_kl(x, teacher, t).sum(), student).norm().item()
        for t in (1e2, 1e4)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert sizes[0] > 0.1


def test_alpha_and_temperature_are_applied(student, teacher):
    def loss(alpha: float, temperature: float) -> float:
        hard = losses.cross_entropy(student, torch.zeros(B * L, dtype=torch.long))
        return (
            losses.distillation(hard, losses.forward_kl(student, teacher, temperature), alpha)
            .sum()
            .item()
        )

    assert (
        len(
            {
                round(loss(alpha, temperature), 9)
                for alpha in (0.0, 0.3, 0.6)
                for temperature in (1.0, 2.0, 4.0)
            }
        )
        == 9
    )


def test_kl_takes_logits_and_is_never_negative(student, teacher):
    assert losses.forward_kl(student, student, 3.0).eq(0).all()
    assert losses.forward_kl(student, teacher, 3.0).gt(0).all()


def test_kl_is_not_divided_by_the_vocabulary(student, teacher):
    unlikely = torch.full(
        (B * L, 1000), -1e4, dtype=torch.float64
    )  # classes that neither model ever chooses
    wide = losses.forward_kl(
        torch.cat([student, unlikely], 1), torch.cat([teacher, unlikely], 1), 2.0
    )
    torch.testing.assert_close(wide, losses.forward_kl(student, teacher, 2.0))


def test_kl_is_not_a_cross_entropy(teacher):
    entropy = Categorical(logits=teacher).entropy()
    assert entropy.min() > 0.1
    assert losses.forward_kl(teacher, teacher, 1.0).eq(0).all()


def test_a_fully_masked_batch_gives_zero_and_not_nan(student, teacher):
    nothing = torch.full((B * L,), losses.IGNORED)
    none = torch.zeros(B * L, dtype=torch.bool)
    for loss in (
        lambda x: losses.mean_over(losses.cross_entropy(x, nothing), 0),
        lambda x: losses.mean_over(losses.forward_kl(x[none], teacher[none], 2.0), 0),
        lambda x: losses.mean_over(losses.binary_cross_entropy(x, torch.full_like(x, math.nan)), 0),
        lambda x: losses.mean_over(losses.hidden_mse(x[None], teacher[None], none[None]), 0),
        lambda x: losses.mean_over(losses.hidden_cosine(x[None], teacher[None], none[None]), 0),
        lambda x: losses.mean_over(
            losses.relation_kl(x[None, None], teacher[None, None], none[None]), 0
        ),
    ):
        assert loss(student) == 0
        assert _gradient(loss, student).eq(0).all()


def test_micro_batches_are_divided_by_the_total_once(student, teacher):
    values = losses.forward_kl(student, teacher, 2.0)
    accumulated = sum(losses.mean_over(part, B * L) for part in values.split([1, 5, 30]))
    torch.testing.assert_close(accumulated, values.mean())


def test_every_token_weighs_the_same_in_short_and_long_texts():
    tokens = [10, 1000]
    labels = torch.zeros(sum(tokens), dtype=torch.long)

    def loss(logits: Tensor) -> Tensor:
        parts = zip(logits.split(tokens), labels.split(tokens), strict=True)
        return torch.stack(
            [losses.mean_over(losses.cross_entropy(*part), sum(tokens)) for part in parts]
        ).sum()

    weights = _gradient(loss, torch.zeros(sum(tokens), C, dtype=torch.float64)).norm(dim=-1)
    torch.testing.assert_close(weights, weights[:1].expand_as(weights))


@pytest.mark.parametrize("function", [losses.hidden_mse, losses.hidden_cosine, losses.relation_kl])
def test_padding_is_masked(function):
    shape = (B, 2, L, C) if function is losses.relation_kl else (B, L, C)
    student, teacher, mask = (
        _random(3, *shape),
        _random(4, *shape),
        torch.arange(L).expand(B, L) < 6,
    )
    cut = [tensor[..., :6, :] for tensor in (student, teacher)]
    total = losses.mean_over(function(student, teacher, mask), B * 6)
    torch.testing.assert_close(total, function(*cut, mask[:, :6]).mean())
    assert _gradient(lambda x: function(x, teacher, mask).sum(), student)[..., 6:, :].eq(0).all()


@pytest.mark.parametrize(
    "divergence",
    [
        losses.forward_kl,
        losses.reverse_kl,
        losses.jensen_shannon,
        losses.skew_kl,
        losses.total_variation,
        losses.logit_mse,
    ],
)
def test_vocabularies_of_different_sizes_are_refused_and_neither_padded_nor_broadcast(
    divergence, student, teacher
):
    for other in (teacher[:, :-1], teacher[:, :1], teacher[:1]):
        with pytest.raises(AssertionError, match="broadcasting"):
            divergence(student, other, 1.0)


def test_zero_logits_for_missing_classes_would_add_mass(teacher):
    """Why vocabularies are not padded: a teacher equal to its student would differ from it."""
    longer = torch.cat([teacher, _random(5, B * L, 3)], 1)
    assert (
        losses.forward_kl(torch.cat([teacher, torch.zeros(B * L, 3)], 1), longer, 1.0).gt(0).all()
    )
    assert losses.forward_kl(teacher, longer[:, :C], 1.0).eq(0).all()


@pytest.mark.parametrize("function", [losses.squared_error, losses.binary_cross_entropy])
def test_labels_of_another_shape_are_refused_and_not_broadcast(function):
    with pytest.raises(AssertionError, match="broadcasting"):
        function(_random(6, B, 1), torch.zeros(B))
