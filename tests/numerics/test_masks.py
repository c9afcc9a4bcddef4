"""Laws of pruning scores and masks."""

from itertools import pairwise

import pytest
import torch

from distill.compress import masks, scores
from distill.errors import UserError

SIZES = [(1, 1), (1, 8), (5, 3), (7, 13), (33, 64)]
SHARES = [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.9, 0.99]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers():
    """Of odd sizes, and of different scales, so that a global threshold treats them differently."""
    return {
        f"{rows}x{columns}": scale * drawn(rows, columns, seed=scale).abs()
        for scale, (rows, columns) in enumerate(SIZES, 1)
    }


def removed(mask):
    return int((~mask).sum())


# ---- scores


def test_magnitude_does_not_see_the_sign():
    weight = drawn(4, 6)
    assert torch.equal(scores.magnitude(weight), scores.magnitude(-weight))
    assert (scores.magnitude(weight) >= 0).all()


def test_wanda_is_the_norm_of_what_a_weight_adds_to_its_output():
    weight_OI, input_NI = drawn(4, 6), drawn(50, 6, seed=1)
    added_NOI = input_NI[:, None, :] * weight_OI
    torch.testing.assert_close(
        scores.wanda(weight_OI, input_NI.square().sum(0)), added_NOI.norm(dim=0)
    )


def test_wanda_is_magnitude_where_all_inputs_are_alike():
    weight_OI = drawn(4, 6)
    assert torch.equal(scores.wanda(weight_OI, torch.ones(6)), scores.magnitude(weight_OI))


def test_movement_grows_where_descent_leads_away_from_zero():
    weight, gradient = drawn(40, 6), drawn(40, 6, seed=1)
    grown = scores.movement(torch.zeros_like(weight), weight, gradient) > 0
    assert torch.equal(grown, (weight - 1e-4 * gradient).abs() > weight.abs())
    assert 0 < grown.sum() < grown.numel()


def test_movement_is_the_gradient_of_the_score():
    """Straight through the mask, dL/dS = dL/dw * w for an effective weight w * S."""
    weight, input_NI = drawn(4, 6), drawn(9, 6, seed=1)
    score = torch.ones_like(weight).requires_grad_()
    effective = (weight * score).detach().requires_grad_()
    for form in (weight * score, effective):
        (input_NI @ form.T).square().sum().backward()
    torch.testing.assert_close(
        scores.movement(torch.zeros_like(weight), weight, effective.grad), -score.grad
    )


# ---- masks


@pytest.mark.parametrize("sparsity", SHARES)
def test_the_sparsity_is_met_to_the_parameter(sparsity):
    given = layers()
    for name, mask in masks.per_layer(given, sparsity).items():
        assert mask.shape == given[name].shape and mask.dtype == torch.bool
        assert removed(mask) == round(sparsity * mask.numel())
    for mask in masks.per_row(given, sparsity).values():
        assert ((~mask).sum(1) == round(sparsity * mask.shape[1])).all()
    whole = masks.across_layers(given, sparsity)
    assert {name: mask.shape for name, mask in whole.items()} == {
        name: score.shape for name, score in given.items()
    }
    assert sum(map(removed, whole.values())) == round(
        sparsity * sum(score.numel() for score in given.values())
    )


@pytest.mark.parametrize("sparsity", SHARES)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "ties"])
def test_the_lowest_go_and_of_equals_the_first(sparsity, repeated):
    score = drawn(17, 11).mul(2).round() if repeated else drawn(17, 11)
    order = score.flatten().argsort(stable=True)
    expected = torch.ones(score.numel(), dtype=torch.bool)
    expected[order[: round(sparsity * score.numel())]] = False
    assert torch.equal(masks.per_layer({"a": score}, sparsity)["a"].flatten(), expected)


@pytest.mark.parametrize("scope", masks.SCOPES)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "ties"])
def test_more_sparsity_removes_all_that_less_does(scope, repeated):
    given = {name: score.mul(2).round() if repeated else score for name, score in layers().items()}
    steps = [masks.SCOPES[scope](given, sparsity) for sparsity in SHARES]
    for less, more in pairwise(steps):
        assert all((less[name] | ~more[name]).all() for name in given)


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_masks_are_a_function_of_the_scores(scope):
    again = {name: score.clone() for name, score in layers().items()}
    first, second = (masks.SCOPES[scope](given, 0.4) for given in (layers(), again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_is_judged_on_its_own():
    score = drawn(6, 10).abs()
    scaled = score * torch.logspace(-3, 3, 6)[:, None]
    assert torch.equal(
        masks.per_row({"a": score}, 0.5)["a"], masks.per_row({"a": scaled}, 0.5)["a"]
    )


def test_one_threshold_holds_for_all_layers():
    given = layers()
    found = masks.across_layers(given, 0.3)
    gone = max(given[name][~mask].max() for name, mask in found.items() if removed(mask))
    assert gone <= min(given[name][mask].min() for name, mask in found.items() if mask.any())
    shares = {name: removed(mask) / mask.numel() for name, mask in found.items()}
    assert max(shares.values()) > 2 * shares["33x64"]  # whose weights are the largest


def test_what_is_infinite_is_kept_or_removed_for_sure():
    score = drawn(4, 8)
    score[0], score[1] = torch.inf, -torch.inf
    mask = masks.per_layer({"a": score}, 0.5)["a"]
    assert mask[0].all() and not mask[1].any()
    assert removed(mask) == 16


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (1, 16)])
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "ties"])
def test_n_of_m_holds_in_every_group(kept, group, repeated):
    score = drawn(7, 48).mul(2).round() if repeated else drawn(7, 48)
    mask = masks.n_of_m({"a": score}, kept, group)["a"]
    groups, values = mask.view(7, -1, group), score.view(7, -1, group)
    assert (groups.sum(-1) == kept).all()
    assert (
        values.masked_fill(~groups, torch.inf).amin(-1)
        >= values.masked_fill(groups, -torch.inf).amax(-1)
    ).all()


def test_a_width_that_the_groups_do_not_fill_is_refused():
    with pytest.raises(
        UserError,
        match="pattern is 2:4, but block.lin1 has 10 inputs, which 4 does not divide: choose a "
        "pattern",
    ):
        masks.n_of_m({"block.lin1": drawn(4, 10)}, 2, 4)


def test_patterns_are_read():
    assert masks.parse_pattern("2:4") == (2, 4)
    assert masks.parse_pattern("1:16") == (1, 16)


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "2", "2:4:8", "-1:4", "a:b", "", 124])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(UserError, match=f"pattern is {pattern}, but it must be N:M with 0 < N < M"):
        masks.parse_pattern(pattern)
