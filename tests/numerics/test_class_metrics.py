"""Metrics of classifiers against their definitions and against torchmetrics, and their memory."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification

from distill.tasks import (
    CausalLanguageModelling,
    MultiLabelClassification,
    SingleLabelClassification,
)
from distill.tasks import class_metrics as scores
from tests.live_bytes import LiveBytes


def decisions(seed: int, classes: int, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions that are right in about half of the rows."""
    generator = np.random.default_rng(seed)
    label, other = generator.integers(0, classes, (2, rows))
    return np.where(generator.random(rows) < 0.5, label, other), label


def correlation(prediction_NC: np.ndarray, label_NC: np.ndarray) -> float:
    """Covariance of two indicator matrices over the root of their variances, or 0."""

    def covariance(one, other):
        return ((one - one.mean(0)) * (other - other.mean(0))).sum()

    variance = covariance(prediction_NC, prediction_NC) * covariance(label_NC, label_NC)
    return covariance(prediction_NC, label_NC) / math.sqrt(variance) if variance else 0.0


def f1(prediction_N: np.ndarray, label_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall of a boolean prediction."""
    right = (prediction_N & label_N).sum()
    if not prediction_N.any() and not label_N.any():
        return math.nan
    if not right:
        return 0.0
    precision, recall = right / prediction_N.sum(), right / label_N.sum()
    return 2 * precision * recall / (precision + recall)


def once(rows: int) -> torch.Tensor:
    """One set of weights, each 1."""
    return torch.ones(rows, 1, dtype=torch.double)


def total(rows: int) -> torch.Tensor:
    return torch.tensor([float(rows)], dtype=torch.double)


def counts_of(prediction, label, classes):
    columns = (torch.as_tensor(prediction), torch.as_tensor(label))
    return scores.count_one_of_c(*columns, classes, once(len(label)))


@pytest.mark.parametrize("classes", [2, 3, 17])
@pytest.mark.parametrize("seed", range(5))
def test_one_of_c_is_as_defined(classes, seed):
    prediction, label = decisions(seed, classes)
    counts, one_hot = counts_of(prediction, label, classes), np.eye(classes)
    expected = [f1(prediction == name, label == name) for name in range(classes)]
    assert counts.f1()[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    assert float(counts.macro_f1()) == pytest.approx(np.nanmean(expected), rel=1e-9)
    assert float(scores.matthews_correlation(counts, total(len(label)))) == pytest.approx(
        correlation(one_hot[prediction], one_hot[label]), rel=1e-9
    )


@pytest.mark.parametrize("seed", range(5))
def test_any_of_c_is_as_defined(seed):
    generator = np.random.default_rng(seed)
    prediction, label = generator.random((2, 100, 6)) < np.linspace(0.05, 0.9, 6)
    both = (torch.from_numpy(prediction), torch.from_numpy(label))
    counts = scores.count_any_of_c(*both, once(100))
    expected = [f1(prediction[:, name], label[:, name]) for name in range(6)]
    assert counts.f1()[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    micro = f1(prediction.ravel(), label.ravel())
    assert float(counts.micro_f1()) == pytest.approx(micro, rel=1e-9)
    pooled = [
        np.stack([part.ravel(), ~part.ravel()], 1).astype(float) for part in (prediction, label)
    ]
    assert float(scores.pooled_matthews_correlation(counts, total(100))) == pytest.approx(
        correlation(*pooled), rel=1e-9
    )


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_torchmetrics_where_every_class_occurs(seed):
    prediction, label = map(torch.from_numpy, decisions(seed, 5))
    counts = counts_of(prediction, label, 5)
    both = (prediction, label, 5)
    f1_by_class = classification.multiclass_f1_score(*both, average="none").tolist()
    assert counts.f1()[:, 0].tolist() == pytest.approx(f1_by_class, rel=1e-6)
    macro = float(classification.multiclass_f1_score(*both))
    assert float(counts.macro_f1()) == pytest.approx(macro, rel=1e-6)
    assert float(scores.matthews_correlation(counts, total(200))) == pytest.approx(
        float(classification.multiclass_matthews_corrcoef(*both)), rel=1e-5
    )
    confidence, right = torch.rand(200, generator=torch.Generator().manual_seed(seed)), label > 2
    assert float(scores.calibration_error(confidence, right, once(200))) == pytest.approx(
        float(classification.binary_calibration_error(confidence, right.long(), 15)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([1, 1, 1], [0, 0, 0]),
        ([0, 1, 0], [0, 0, 0]),
        ([0, 0, 0], [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_matthews_correlation_of_one_class_is_0(prediction, label, classes):
    counts = counts_of(np.array(prediction), np.array(label), classes)
    assert scores.matthews_correlation(counts, total(3)) == 0
    columns = [torch.tensor([[value == 1] for value in values]) for values in (prediction, label)]
    counts = scores.count_any_of_c(*columns, once(3))
    assert scores.pooled_matthews_correlation(counts, total(3)) == 0


def test_the_matthews_correlation_of_large_counts_is_exact():
    columns = ([10**8, 1], [10**8 + 1, 1], [10**8, 2])
    counts = scores.Counts(*(torch.tensor(column).double()[:, None] for column in columns))
    # Of 100,000,002 rows, one is predicted as the other class.
    expected = math.sqrt(0.5 * 10**8 / (10**8 + 1))
    correlation = scores.matthews_correlation(counts, total(10**8 + 2))
    assert float(correlation) == pytest.approx(expected, rel=1e-9)


def reference_error(confidence, correct, bins=15):
    """The calibration error by its definition, bin by bin."""
    total = 0.0
    edges = np.float32([edge / bins for edge in range(bins + 1)])
    for index in range(bins):
        last = index == bins - 1
        above = confidence >= edges[index]
        rows = above & ((confidence <= 1) if last else (confidence < edges[index + 1]))
        if rows.any():
            total += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    return total


@pytest.mark.parametrize("seed", range(8))
def test_the_calibration_error_is_as_defined_at_the_edges_of_bins_too(seed):
    generator = np.random.default_rng(seed)
    edges = np.float32([edge / 15 for edge in range(16)])
    confidence = np.concatenate([generator.choice(edges, 40), generator.random(40)])
    confidence = confidence.astype(np.float32)
    correct = generator.random(80) < confidence
    measured = scores.calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(correct), once(80)
    )
    assert float(measured) == pytest.approx(reference_error(confidence, correct), abs=1e-6)


def test_a_confidence_of_1_is_in_the_last_bin():
    confidence, correct = torch.tensor([1.0, 1.0, 0.95, 0.95]), torch.tensor([1, 0, 1, 1])
    assert float(scores.calibration_error(confidence, correct, once(4))) == pytest.approx(0.225)
    assert scores.calibration_error(torch.ones(4), torch.ones(4), once(4)) == 0
    assert scores.calibration_error(torch.zeros(4), torch.zeros(4), once(4)) == 0


# ---- classes that a split does not hold


def measured(task, names, label, prediction_logits):
    task.names = names
    batch = task.collate([{"input_ids": [1], "labels": each, "size": 1} for each in label], 0)
    return task.compute_metrics(task.outcomes(torch.tensor(prediction_logits), batch))


def test_classes_without_examples_have_no_f1():
    # c has no example; it is predicted once, so that it counts in the mean. d has neither.
    quality = measured(
        SingleLabelClassification(),
        ("a", "b", "c", "d"),
        [0, 0, 1, 1],
        [[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0]],
    )
    assert {name for name in quality if name.startswith("f1/")} == {"f1/a", "f1/b"}
    assert quality["f1/b"] == pytest.approx(2 / 3)
    assert quality["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_labels_without_examples_have_no_f1():
    quality = measured(
        MultiLabelClassification(),
        ("a", "b", "c"),
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[9.0, 9.0, -9.0], [-9.0, -9.0, -9.0]],
    )
    assert {name for name in quality if name.startswith("f1/")} == {"f1/a"}
    assert quality["macro_f1"] == pytest.approx(0.5)
    nothing = measured(MultiLabelClassification(), ("a", "b"), [[0.0, 0.0]], [[-9.0, -9.0]])
    assert math.isnan(nothing["macro_f1"])
    assert math.isnan(nothing["micro_f1"])
    assert nothing["exact_match"] == 1


# ---- weights


def single_label_columns(generator):
    label = torch.randint(-1, 5, (40,), generator=generator)
    return {
        "label": torch.where(label < 0, -100, label),
        "prediction": torch.randint(5, (40,), generator=generator),
        "confidence": torch.rand(40, generator=generator),
        "nll": torch.rand(40, generator=generator),
    }


def multi_label_columns(generator):
    label = (torch.rand(40, 5, generator=generator) < 0.3).float()
    label[3] = math.nan
    return {
        "label": label,
        "probability": torch.rand(40, 5, generator=generator),
        "nll": torch.rand(40, generator=generator),
    }


def language_columns(generator):
    names = ("nll", "tokens", "correct", "bytes")
    return {name: torch.randint(1, 9, (40,), generator=generator) for name in names}


@pytest.mark.parametrize(
    ("task", "make"),
    [
        (SingleLabelClassification(), single_label_columns),
        (MultiLabelClassification(), multi_label_columns),
        (CausalLanguageModelling(), language_columns),
    ],
    ids=["single label", "multi label", "language"],
)
def test_an_example_of_weight_3_counts_as_three_examples(task, make):
    task.names = tuple("abcde")
    generator = torch.Generator().manual_seed(0)
    columns = make(generator)
    sets = torch.randint(4, (40, 6), generator=generator)
    sets[:, 5] = 0  # nothing was drawn
    weighted = task.weighted_metrics(columns, sets.double())
    for number, count_N in enumerate(sets.T):
        repeated = {name: column.repeat_interleave(count_N, 0) for name, column in columns.items()}
        expected = task.compute_metrics(repeated)
        for name, values in weighted.items():
            value = expected.get(name, math.nan)
            assert float(values[number]) == pytest.approx(value, rel=1e-12, nan_ok=True), name


# ---- memory


@pytest.mark.parametrize("deterministic", [False, True])
def test_ten_thousand_labels_need_memory_of_rows_plus_labels(deterministic):
    rows, classes = 20_000, 10_000
    task = SingleLabelClassification()
    task.names = tuple(map(str, range(classes)))
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (rows,), generator=generator)
    columns = {
        "label": label,
        "prediction": torch.where(
            torch.rand(rows, generator=generator) < 0.5, label, label.flip(0)
        ),
        "confidence": torch.rand(rows, generator=generator),
        "nll": torch.rand(rows, generator=generator),
    }
    torch.use_deterministic_algorithms(deterministic)
    try:
        with LiveBytes() as memory:
            quality = task.compute_metrics(columns)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < memory.peak < 30 * 8 * (rows + classes)
    assert 0.49 < quality["accuracy"] < 0.52
    assert sum(name.startswith("f1/") for name in quality) == len(label.unique())
