"""A teacher that disagrees with the labels is refused before a student learns from it."""

import itertools
import logging
import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from distill import teacher_outputs
from distill.errors import UserError
from distill.tasks import (
    CausalLanguageModelling,
    MultiLabelClassification,
    Regression,
    SingleLabelClassification,
)
from distill.tasks.batch import Batch
from distill.teacher_outputs import class_order
from distill.teacher_outputs.assignment import best_assignment

TRAINED = teacher_outputs.Origin(is_trained=True)
NAMES = ("food", "sport", "tech")


def classifier(kind=SingleLabelClassification):
    task = kind()
    task.names = NAMES
    return task


def check(task, logits_NC, labels, origin=TRAINED):
    count = len(labels)
    batch = Batch({}, labels, None, torch.arange(count), torch.ones(count))
    return teacher_outputs.check_labels(task, [batch], lambda _: logits_NC, origin)


def answers(count, order, share=0.9, seed=0):
    """Labels, and logits of a teacher that is right for a share of them, its classes reordered."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(order), (count,), generator=generator)
    right = torch.rand(count, generator=generator) < share
    guessed = torch.where(right, labels, torch.randint(3, (count,), generator=generator))
    return 4.0 * one_hot(torch.tensor(order).argsort()[guessed], len(order)), labels


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:], ids=str)
def test_the_sentence_names_the_permutation(order):
    logits_NC, labels = answers(200, order)
    names = ", ".join(NAMES[target] for target in order)
    with pytest.raises(UserError, match=re.escape(f"set data.labels to [{names}]")):
        check(classifier(), logits_NC, labels)
    # With the labels in that order, the same teacher is accepted.
    check(classifier(), logits_NC, torch.tensor(order).argsort()[labels])


def test_a_teacher_with_names_of_its_own_is_to_be_corrected_itself():
    named = teacher_outputs.Origin(is_trained=True, has_names=True)
    with pytest.raises(UserError, match="correct id2label"):
        check(classifier(), *answers(200, (1, 0, 2)), named)


@pytest.mark.parametrize(
    ("count", "order", "share", "origin"),
    [
        (8, (1, 2, 0), 0.9, TRAINED),  # few rows
        (400, (0, 1, 2), 0.0, TRAINED),  # weak
        (400, (1, 2, 0), 0.9, teacher_outputs.Origin(is_trained=False)),  # random weights
    ],
)
def test_a_weak_teacher_and_few_rows_are_only_warned_of(count, order, share, origin, caplog):
    with caplog.at_level(logging.WARNING, "distill"):
        check(classifier(), *answers(count, order, share), origin)
    assert "chance" in caplog.text


def test_a_good_teacher_s_quality_is_logged(caplog):
    logits_NC, labels = answers(100, (0, 1, 2))
    with caplog.at_level(logging.INFO, "distill"):
        metrics = check(classifier(), logits_NC, labels)
    assert metrics["accuracy"] == (logits_NC.argmax(-1) == labels).float().mean()
    assert f"accuracy is {metrics['accuracy']:.4g} on 100" in caplog.text
    assert "chance" not in caplog.text


def test_wrong_everywhere_without_an_order_that_fits_is_refused():
    labels = torch.arange(600) % 3
    wrong = (labels + 1 + (torch.arange(600) // 3) % 2) % 3
    with pytest.raises(UserError, match="accuracy is 0 "):
        check(classifier(), 4.0 * one_hot(wrong, 3), labels)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)], ids=str)
def test_classes_of_several_labels_are_found_too(order):
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(300, 3, generator=generator) < 0.3).float()
    noise = torch.randn(300, 3, generator=generator)
    logits_NC = (labels * 4 - 2 + noise)[:, list(order)]
    task = classifier(MultiLabelClassification)
    names = ", ".join(NAMES[target] for target in order)
    with pytest.raises(UserError, match=re.escape(f"[{names}]")):
        check(task, logits_NC, labels)
    check(task, logits_NC, labels[:, list(order)])


@pytest.mark.parametrize(
    ("slope", "offset", "problem"),
    [(-1.0, 0.0, "rise with the labels"), (0.1, -3.0, r"30 \+ 10 x"), (1.0, 0.1, None)],
)
def test_numbers_with_another_sign_or_scale_are_refused(slope, offset, problem):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(200, 1, generator=generator)
    logits_NC = slope * labels + offset + 1e-3 * torch.randn(200, 1, generator=generator)
    if problem is None:
        check(Regression(), logits_NC, labels)
    else:
        with pytest.raises(UserError, match=problem):
            check(Regression(), logits_NC, labels)


def test_a_language_model_with_other_ids_is_refused():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (400,), generator=generator)
    task = CausalLanguageModelling()
    check(task, 5.0 * one_hot(labels, 50), labels)
    with pytest.raises(UserError, match=f"{math.log(50):.2f}: its token ids"):
        check(task, 9.0 * one_hot((labels + 1) % 50, 50), labels)


# ---- statistics


def test_the_best_assignment_is_that_of_all_permutations():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 5):
        for _ in range(20):
            score = generator.normal(size=(size, size))
            sums = {
                order: score[range(size), order].sum()
                for order in itertools.permutations(range(size))
            }
            assert tuple(best_assignment(score)) == max(sums, key=sums.__getitem__)


@pytest.mark.parametrize("classes", [2, 5, 20])
@pytest.mark.parametrize("count", [20, 200])
def test_predictions_that_know_nothing_are_not_refused(classes, count):
    generator = np.random.default_rng(2)
    for _ in range(100):
        drawn = (
            generator.choice(classes, count, p=generator.dirichlet(np.full(classes, 0.5)))
            for _ in range(2)
        )
        agreement = class_order.class_agreement(
            *(one_hot(torch.from_numpy(each), classes) for each in drawn)
        )
        assert not agreement.reordered and not agreement.below_chance


def test_two_swapped_classes_of_many_are_found_alone():
    labels = torch.arange(2000) % 50
    order = [1, 0, *range(2, 50)]
    agreement = class_order.class_agreement(
        one_hot(torch.tensor(order)[labels], 50), one_hot(labels, 50)
    )
    assert agreement.order == tuple(order) and agreement.above_chance


def test_the_statistic_of_many_classes_is_that_of_few(monkeypatch):
    logits_NC, labels = answers(50, (0, 1, 2))
    predicted_NC, labels_NC = one_hot(logits_NC.argmax(-1), 3), one_hot(labels, 3)
    surprise_NC = (labels_NC - labels_NC.double().mean(0)).numpy()
    few = class_order._statistic(predicted_NC.numpy(), surprise_NC)
    monkeypatch.setattr(class_order, "MOST_ORDERED", 2)
    assert class_order._statistic(predicted_NC.numpy(), surprise_NC) == pytest.approx(few)


def test_a_teacher_of_ten_thousand_classes_is_compared_in_bounded_memory(caplog):
    task = SingleLabelClassification()
    task.names = tuple(map(str, range(10_000)))
    labels = torch.arange(0, 10_000, 11)
    logits_NC = torch.zeros(len(labels), 10_000)
    logits_NC[torch.arange(len(labels)), labels] = 5.0
    assert check(task, logits_NC, labels)["accuracy"] == 1
    assert "chance" not in caplog.text
    check(task, logits_NC, labels.flip(0))
    assert "chance" in caplog.text
