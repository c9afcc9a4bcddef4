"""Draws by class: proportions, sizes, and the last example of a class."""

import time

import numpy as np
import pytest

from distill.data.stratified import LabelSets, apportion, draw_by_class, draw_by_labels


def sparse(indicators_NC: np.ndarray) -> LabelSets:
    return LabelSets.of(map(np.flatnonzero, indicators_NC), indicators_NC.shape[1])


def rows_without(drawn, total: int) -> np.ndarray:
    return np.setdiff1d(np.arange(total), np.concatenate(drawn))


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_exact_shares_rounded_up_or_down_unless_capped(seed):
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, 50, 12)
    total = int(generator.integers(0, 100))
    caps = generator.integers(0, 30, 12) if seed % 2 else np.full(12, 1000)
    total = min(total, int(caps.sum()))
    parts = apportion(weights, caps, total, generator.random(12))
    assert parts.sum() == total
    assert (parts <= caps).all()
    if (caps == 1000).all() and weights.sum():
        assert (np.abs(parts - total * weights / weights.sum()) < 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_each_class_has_its_share_and_keeps_an_example(seed):
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.repeat(np.arange(8), generator.integers(1, 60, 8)))
    size = max(1, len(classes) // 10)
    drawn = draw_by_class(classes, size, seed)
    assert [len(part) for part in drawn] == [size, size]
    assert len(np.intersect1d(*drawn)) == 0
    counts = np.bincount(classes)
    assert (np.bincount(classes[rows_without(drawn, len(classes))], minlength=8) >= 1).all()
    exact = size * counts / len(classes)
    free = counts > 2 * np.ceil(exact)  # the others may be capped
    for part in drawn:
        assert (np.abs(np.bincount(classes[part], minlength=8) - exact)[free] <= 1).all()


def test_fewer_are_drawn_where_every_class_has_one_example_to_spare():
    classes = np.repeat(np.arange(10), 2)
    first, second = draw_by_class(classes, 8, 0)
    assert len(first) == len(second) == 5
    assert sorted(classes[rows_without((first, second), 20)]) == list(range(10))
    assert [len(part) for part in draw_by_class(np.arange(10), 1, 0)] == [0, 0]


def test_a_draw_depends_on_the_seed_only():
    classes = np.random.default_rng(1).integers(0, 5, 300)
    one, same, other = (draw_by_class(classes, 30, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(left, right) for left, right in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])
    labels = sparse(np.random.default_rng(2).random((300, 5)) < 0.2)
    one, same, other = (draw_by_labels(labels, 30, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(left, right) for left, right in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("seed", range(20))
def test_every_label_of_several_keeps_an_example(seed):
    generator = np.random.default_rng(seed)
    frequencies = generator.choice([0.003, 0.02, 0.3], 30)
    indicators = generator.random((400, 30)) < frequencies
    drawn = draw_by_labels(sparse(indicators), 40, seed)
    assert [len(part) for part in drawn] == [40, 40]
    assert len(np.intersect1d(*drawn)) == 0
    left = indicators[rows_without(drawn, 400)]
    assert (left.any(0) == indicators.any(0)).all()


def test_labels_of_several_are_closer_to_their_shares_than_by_chance():
    generator = np.random.default_rng(0)
    indicators = generator.random((2000, 20)) < np.linspace(0.005, 0.3, 20)
    exact = indicators.sum(0) / 10

    def error(part):
        return np.abs(indicators[part].sum(0) - exact).mean()

    stratified = [error(part) for part in draw_by_labels(sparse(indicators), 200, 0)]
    chance = [error(generator.permutation(2000)[:200]) for _ in range(50)]
    assert max(stratified) < min(chance)
    assert max(stratified) < 1.5


def test_single_labels_as_sets_keep_the_shares_of_classes():
    classes = np.repeat(np.arange(4), [200, 100, 60, 40])
    labels = LabelSets.of(([each] for each in classes), 4)
    for part in draw_by_labels(labels, 40, 0):
        assert np.bincount(classes[part]).tolist() == [20, 10, 6, 4]


def test_a_label_that_is_named_twice_counts_once():
    once = [[row % 3, 3] for row in range(60)]
    twice = [[*each, *each] for each in once]
    for one, other in zip(
        *(draw_by_labels(LabelSets.of(each, 4), 6, 0) for each in (once, twice)), strict=True
    ):
        assert np.array_equal(one, other)


def test_examples_without_any_label_are_drawn_in_their_share():
    indicators = np.zeros((100, 3), bool)
    indicators[:30, 0] = True
    for part in draw_by_labels(sparse(indicators), 10, 0):
        assert (len(part), indicators[part].any(1).sum()) == (10, 3)


@pytest.mark.parametrize("draw", ["classes", "labels"])
def test_large_draws_are_vectorised(draw):
    generator, start = np.random.default_rng(0), time.process_time()
    classes = generator.zipf(1.5, 300_000).clip(max=2000) - 1
    if draw == "classes":
        drawn = draw_by_class(classes, 30_000, 0)
    else:
        labels = LabelSets(classes, np.arange(300_000), np.ones(300_000, int), 2000)
        drawn = draw_by_labels(labels, 30_000, 0)
    assert [len(part) for part in drawn] == [30_000, 30_000]
    assert time.process_time() - start < 5
