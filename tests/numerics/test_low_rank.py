"""What truncated SVD promises, weighted and not."""

import pytest
import torch

from distill.compress import low_rank

SHAPES = [(6, 9), (9, 6), (7, 7)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(width, kind):
    """Inputs of unequal directions; `deficient` ones leave some out."""
    input_ND = random(50, width, seed=1) * torch.logspace(0, -2, width, dtype=torch.float64)
    if kind == "deficient":
        input_ND = input_ND[:, : width // 2] @ random(width // 2, width, seed=2)
    return input_ND


def product(weight, rank, moment=None):
    second, first = low_rank.factors(weight, low_rank.spectrum(weight, moment)[0][:, :rank])
    assert second.shape == (weight.shape[0], rank)
    assert first.shape == (rank, weight.shape[1])
    return second @ first


@pytest.mark.parametrize("kind", [None, "full", "deficient", "diagonal", "nothing"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape, kind):
    weight = random(*shape)
    moment = None
    if kind == "diagonal":
        moment = inputs(shape[1], "full").square().sum(0)
    elif kind == "nothing":
        moment = torch.zeros(shape[1], shape[1])
    elif kind is not None:
        moment = low_rank.second_moment(inputs(shape[1], kind))
    torch.testing.assert_close(product(weight, min(shape), moment), weight, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_weights_the_error_is_what_is_left_of_the_spectrum(shape):
    weight = random(*shape)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape)):
        error = (weight - product(weight, rank)).norm()
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("kind", ["full", "deficient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_factors_disturb_the_outputs_least(shape, kind):
    weight, input_ND = random(*shape), inputs(shape[1], kind)
    moment = low_rank.second_moment(input_ND)
    better = 0
    for rank in range(1, min(shape)):
        weighted, plain = (
            ((weight - product(weight, rank, each)) @ input_ND.T).norm() for each in (moment, None)
        )
        scale = (weight @ input_ND.T).norm()
        assert weighted <= plain + 1e-3 * scale  # the ridge
        better += weighted < 0.9 * plain
        bound = torch.linalg.svdvals(weight @ input_ND.T)[
            rank:
        ].norm()  # no matrix of this rank does better
        torch.testing.assert_close(weighted, bound, rtol=1e-3, atol=1e-3 * float(scale))
    assert better


def test_a_diagonal_moment_is_that_of_independent_inputs():
    weight, scales = random(6, 9), torch.logspace(0, -2, 9, dtype=torch.float64)
    full, diagonal = product(weight, 3, torch.diag(scales)), product(weight, 3, scales)
    torch.testing.assert_close(full, diagonal, rtol=1e-9, atol=1e-9)


def test_moments_of_very_wide_inputs_are_diagonal(monkeypatch):
    input_ND = random(5, 9)
    torch.testing.assert_close(
        low_rank.second_moment(input_ND), sum(torch.outer(x, x) for x in input_ND)
    )
    monkeypatch.setattr(low_rank, "MAX_FEATURES", 8)
    torch.testing.assert_close(low_rank.second_moment(input_ND), (input_ND**2).sum(0))


def test_moments_are_exact_under_autocast():
    input_ND = random(50, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        under = low_rank.second_moment(input_ND)
    assert torch.equal(under, low_rank.second_moment(input_ND))
    assert under.dtype == torch.float32


@pytest.mark.parametrize("moment", [None, torch.eye(9) * torch.arange(1, 10)])
def test_factors_are_balanced_and_of_the_weight_s_type(moment):
    weight = random(6, 9).float()
    second, first = low_rank.factors(weight, low_rank.spectrum(weight, moment)[0][:, :4])
    assert second.dtype == first.dtype == torch.float32
    torch.testing.assert_close(second.T @ second, first @ first.T, rtol=1e-5, atol=1e-5)


def test_energy_is_the_share_of_the_squared_singular_values():
    values = torch.tensor([3.0, 2.0, 1.0, 1e-9, 0.0], dtype=torch.float64)
    ranks = {0.1: 1, 9 / 14 - 1e-9: 1, 9 / 14 + 1e-9: 2, 13 / 14 - 1e-9: 2, 13 / 14 + 1e-9: 3, 1: 4}
    assert {energy: low_rank.rank_for_energy(values, energy) for energy in ranks} == ranks
    assert low_rank.rank_for_energy(torch.zeros(3), 0.5) == 1


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_rank_of_an_energy_keeps_it_and_one_less_does_not(energy):
    weight = random(12, 9)
    _, values = low_rank.spectrum(weight)
    rank = low_rank.rank_for_energy(values, energy)
    kept = [
        float(product(weight, each).square().sum() / weight.square().sum())
        for each in (rank, rank - 1)
        if each
    ]
    assert kept[0] >= energy - 1e-12
    assert all(share < energy for share in kept[1:])
    assert energy < 1 or rank == 9


@pytest.mark.parametrize(("out", "inputs"), [(16, 16), (16, 32), (33, 17), (1, 5), (2, 2)])
def test_only_fewer_numbers_are_worthwhile(out, inputs):
    sizes = {rank: rank * (out + inputs) for rank in range(1, out + inputs)}
    assert {rank for rank in sizes if low_rank.saves_parameters(rank, out, inputs)} == {
        r for r, size in sizes.items() if size < out * inputs
    }
    assert low_rank.max_rank(out, inputs) == max(
        (r for r, size in sizes.items() if size < out * inputs), default=0
    )
