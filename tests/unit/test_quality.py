"""Intervals and tests keep their promises: they hold the value, shrink, cover, and pairing pays."""

import math

import numpy as np
import pytest
import torch

from distill.evaluate import quality
from distill.tasks import SingleLabelClassification


class Mean:
    """The mean of a column, as a task."""

    primary = "mean"

    def quality(self, columns):
        return {"mean": float(columns["x"].double().mean())}


class Unknown(Mean):
    def quality(self, columns):
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


def test_every_interval_holds_its_value_and_every_metric_has_one(topics):
    measured = quality.bootstrap(topics, classified(60), 200, seed=0)
    intervals = measured.intervals()
    assert intervals.keys() == topics.quality(classified(60)).keys()
    for metric, (value, low, high) in intervals.items():
        assert value == topics.quality(classified(60))[metric]
        assert low <= value <= high
        assert high > low


def test_four_times_the_examples_halve_the_interval():
    widths = [
        high - low
        for size in (200, 800)
        for _, low, high in quality.bootstrap(Mean(), column(size), 500, 0).intervals().values()
    ]
    assert widths[1] / widths[0] == pytest.approx(0.5, rel=0.2)


def test_the_interval_is_the_textbook_one_for_a_mean():
    value, low, high = quality.bootstrap(Mean(), column(400), 4000, 0).intervals()["mean"]
    assert (low - value, high - value) == pytest.approx((-1.96 / 20, 1.96 / 20), rel=0.1)


def test_95_percent_of_the_intervals_cover_the_truth():
    intervals = [
        quality.bootstrap(Mean(), column(40, seed=seed), 200, seed).intervals()["mean"]
        for seed in range(200)
    ]
    assert 0.90 <= np.mean([low <= 0 <= high for _, low, high in intervals]) <= 0.99


def test_bias_of_resampling_is_corrected():
    draws = np.random.default_rng(0).normal(
        1.0, 1.0, 4000
    )  # a metric that resampling inflates by one standard deviation
    _, low, high = quality.interval(0.0, draws)
    assert (low, high) == pytest.approx((-1 - 1.96, -1 + 1.96), abs=0.3)
    assert quality.interval(-10.0, draws).low == -10.0


def test_nothing_is_claimed_where_nothing_is_known():
    value, low, high = quality.bootstrap(Unknown(), column(10), 20, 0).intervals()["mean"]
    assert math.isnan(value)
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(quality.randomisation(Unknown(), column(10), column(10), 20, 0))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    first, again, other = (
        quality.bootstrap(Mean(), column(50), 50, seed).draws["mean"] for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_identical_models_differ_by_nothing(topics):
    columns = classified(50)
    drawn = quality.bootstrap(topics, columns, 100, 0)
    assert quality.difference(drawn, drawn, "accuracy") == (0, 0, 0)
    assert quality.randomisation(topics, columns, columns, 100, 0) == 1


def test_pairing_narrows_the_interval_of_models_that_err_alike():
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


def test_a_true_difference_is_found_whichever_model_is_named_first():
    worse, better = column(100), column(100, seed=1, shift=1.0)
    p = quality.randomisation(Mean(), worse, better, 199, 0)
    assert p == quality.randomisation(Mean(), better, worse, 199, 0) == 1 / 200


def test_equally_good_models_are_told_apart_by_chance_only():
    found = [
        quality.randomisation(Mean(), column(30, seed=seed), column(30, seed=1000 + seed), 99, seed)
        for seed in range(200)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.1
    assert np.mean(found) == pytest.approx(0.5, abs=0.1)


def test_columns_of_several_dimensions_are_swapped_example_by_example():
    student, teacher = {"x": torch.zeros(50, 2, 3)}, {"x": torch.ones(50, 2, 3)}
    swapped = quality._swapped(student, teacher, torch.arange(50) < 10)
    assert (swapped[0]["x"][:10] == 1).all()
    assert (swapped[0]["x"][10:] == 0).all()
    assert (swapped[0]["x"] + swapped[1]["x"] == 1).all()


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(1.0, 200, 0.9812, 1.0), (0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775)],
)
def test_the_interval_of_a_share_is_wilsons(share, count, low, high):
    assert quality.share_interval(share, count) == pytest.approx([low, high], abs=1e-4)
