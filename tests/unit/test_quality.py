"""Bootstrap intervals and the paired test of two models."""

import math

import numpy as np
import pytest
import torch

from distill.evaluate import quality
from distill.tasks import SingleLabelClassification


class Mean:
    """The mean of a column, as a task."""

    primary_metric = "mean"

    def has_weighted_metrics(self):
        return False

    def compute_metrics(self, columns):
        return {"mean": float(columns["x"].double().mean())}


class Unknown(Mean):
    def compute_metrics(self, columns):
        return {"mean": math.nan}


def column(*shape, seed=0, shift=0.0):
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift}


def classified(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    confidence, prediction = torch.randn(size, 3, generator=generator).softmax(-1).max(-1)
    return {
        "label": labels,
        "prediction": prediction,
        "confidence": confidence,
        "nll": -confidence.log(),
    }


@pytest.fixture
def topics():
    task = SingleLabelClassification()
    task.names = ("a", "b", "c")
    return task


def test_every_metric_has_an_interval_that_contains_its_value(topics):
    measured = quality.bootstrap(topics, classified(60), 200, seed=0)
    intervals = measured.intervals()
    assert intervals.keys() == topics.compute_metrics(classified(60)).keys()
    for metric, (value, low, high) in intervals.items():
        assert value == topics.compute_metrics(classified(60))[metric]
        assert low <= value <= high
        assert high > low


def test_resamples_at_once_are_those_that_are_drawn_one_by_one(topics, monkeypatch):
    student, teacher = classified(60), classified(60, seed=1)
    at_once = quality.bootstrap(topics, student, 250, 0).draws
    p_at_once = quality.randomization_test(topics, student, teacher, 250, 0)
    monkeypatch.setattr(SingleLabelClassification, "has_weighted_metrics", lambda _: False)
    one_by_one = quality.bootstrap(topics, student, 250, 0).draws
    assert at_once.keys() == one_by_one.keys()
    for name, draws in at_once.items():
        np.testing.assert_allclose(draws, one_by_one[name], rtol=1e-12)
    assert p_at_once == quality.randomization_test(topics, student, teacher, 250, 0)


def test_four_times_the_examples_halve_the_interval():
    widths = [
        high - low
        for size in (200, 800)
        for _, low, high in quality.bootstrap(Mean(), column(size), 500, 0).intervals().values()
    ]
    assert widths[1] / widths[0] == pytest.approx(0.5, rel=0.2)


def test_the_interval_of_a_mean_is_1_96_standard_errors_wide():
    value, low, high = quality.bootstrap(Mean(), column(400), 4000, 0).intervals()["mean"]
    assert (low - value, high - value) == pytest.approx((-1.96 / 20, 1.96 / 20), rel=0.1)


def test_95_percent_of_the_intervals_contain_the_true_mean():
    intervals = [
        quality.bootstrap(Mean(), column(40, seed=seed), 200, seed).intervals()["mean"]
        for seed in range(100)
    ]
    assert 0.90 <= np.mean([low <= 0 <= high for _, low, high in intervals]) <= 0.99


def test_the_bias_of_resampling_is_corrected():
    draws = np.random.default_rng(0).normal(
        1.0, 1.0, 4000
    )  # a metric that resampling inflates by one standard deviation
    _, low, high = quality.interval(0.0, draws)
    assert (low, high) == pytest.approx((-1 - 1.96, -1 + 1.96), abs=0.3)
    assert quality.interval(-10.0, draws).low == -10.0


def test_draws_that_are_equal_but_for_rounding_are_equal():
    exact = np.repeat([0.3, 0.4, 0.7], (4, 9, 7))
    rounded = exact + np.resize([-1e-16, 5e-17, 0], 20)
    expected = quality.interval(0.4, exact)
    assert quality.interval(0.4, rounded) == pytest.approx(expected, abs=1e-12)


def test_a_metric_that_is_nan_has_no_interval_and_no_p_value():
    value, low, high = quality.bootstrap(Unknown(), column(10), 20, 0).intervals()["mean"]
    assert math.isnan(value)
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(quality.randomization_test(Unknown(), column(10), column(10), 20, 0))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    first, again, other = (
        quality.bootstrap(Mean(), column(50), 50, seed).draws["mean"] for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_identical_models_have_no_difference(topics):
    columns = classified(50)
    drawn = quality.bootstrap(topics, columns, 100, 0)
    assert quality.difference(drawn, drawn, "accuracy") == (0, 0, 0)
    assert quality.randomization_test(topics, columns, columns, 100, 0) == 1


def test_paired_draws_narrow_the_interval_of_correlated_models():
    teacher = column(300)
    student = {"x": teacher["x"] + 0.1 * column(300, seed=1)["x"]}
    paired = quality.difference(
        *(quality.bootstrap(Mean(), one, 500, 0) for one in (student, teacher)), "mean"
    )
    unpaired = quality.difference(
        quality.bootstrap(Mean(), student, 500, 0),
        quality.bootstrap(Mean(), teacher, 500, 1),
        "mean",
    )
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert paired.value == pytest.approx(unpaired.value)


def test_a_true_difference_is_significant_in_both_orders():
    worse, better = column(100), column(100, seed=1, shift=1.0)
    p = quality.randomization_test(Mean(), worse, better, 199, 0)
    assert p == quality.randomization_test(Mean(), better, worse, 199, 0) == 1 / 200


def test_p_values_of_equally_good_models_are_uniform():
    p_values = [
        quality.randomization_test(
            Mean(), column(30, seed=seed), column(30, seed=1000 + seed), 99, seed
        )
        for seed in range(100)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.1
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(1.0, 200, 0.9812, 1.0), (0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775)],
)
def test_the_interval_of_a_share_is_wilson_s(share, count, low, high):
    assert quality.share_interval(share, count) == pytest.approx([low, high], abs=1e-4)
