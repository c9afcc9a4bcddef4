"""Class weights: factors of the loss against labels, not of metrics or of the divergence."""

import math

import pytest
import torch
from torch.nn import functional

from distill import data, resume, store, teacher
from distill.errors import UserError
from distill.module import Distillation
from distill.prepare import prepare_run
from distill.recipe import config
from distill.tasks import (
    CausalLanguageModelling,
    MultiLabelClassification,
    Regression,
    SingleLabelClassification,
)
from distill.train import train
from distill.training import loop
from tests.worlds import tiny, world

NAMES = ("food", "sport", "tech")


def task_of(kind=SingleLabelClassification, names=NAMES):
    task = kind()
    task.names = names
    return task


def rows(kind, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, generator=generator, dtype=torch.double)
    if kind is SingleLabelClassification:
        return logits, torch.randint(3, (count,), generator=generator)
    return logits, (torch.rand(count, 3, generator=generator) < 0.4).double()


# ---- the key


@pytest.mark.parametrize(
    "weights", [{"tech": 2.0, "food": 1, "sport": 5.0}, [1.0, 5.0, 2.0], (1, 5, 2)]
)
def test_weights_come_in_the_order_of_the_labels(weights):
    assert task_of().class_weights(weights, None) == [1.0, 5.0, 2.0]
    assert task_of().class_weights(None, None) is None


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"food": 1, "sport": 1, "tecc": 1}, "tecc"),
        ({"food": 1, "sport": 1}, "leaves out tech"),
        ([1.0, 2.0], r"\[1.0, 2.0\]"),
    ],
)
def test_weights_that_do_not_fit_the_labels_are_refused(weights, fault):
    with pytest.raises(UserError, match=rf"loss\.class_weights .*{fault}.* food, sport, tech"):
        task_of().class_weights(weights, None)


@pytest.mark.parametrize("task", [CausalLanguageModelling(), Regression()])
def test_weights_without_classes_are_refused(task):
    with pytest.raises(UserError, match=f"loss.class_weights is balanced.*{type(task).__name__}"):
        task.class_weights("balanced", [])


@pytest.mark.parametrize(
    "value", ["balance", 2.0, {"a": -1.0}, {"a": math.inf}, {"a": "much"}, [0.0, 0.0], {}]
)
def test_values_that_are_no_weights_are_refused(value):
    with pytest.raises(UserError, match="loss.class_weights is"):
        config.Loss(class_weights=value)


def test_names_that_yaml_reads_as_numbers_are_names():
    assert task_of(names=("1", "2")).class_weights(
        config.Loss(class_weights={1: 2.0, 2: 3.0}).class_weights, None
    ) == [2.0, 3.0]


def test_weights_of_labels_that_do_not_enter_any_loss_are_refused():
    with pytest.raises(UserError, match=r"loss\.class_weights is balanced, but loss\.alpha is 0"):
        tiny(loss={"alpha": 0.0, "class_weights": "balanced"})


# ---- balanced


def test_balanced_classes_weigh_the_same_and_1_on_average():
    cells = ["food"] * 6 + ["sport"] * 3 + [None] * 5
    weights = task_of().class_weights("balanced", cells)
    assert weights == [0.75, 1.5, 1.0]  # no example is of the last
    assert 6 * weights[0] == 3 * weights[1] == 4.5


def test_balanced_labels_weigh_the_same_as_their_absence():
    cells = [["food"]] * 2 + [["food", "sport"]] * 3 + [[]] * 5 + [None]
    weights = task_of(MultiLabelClassification).class_weights("balanced", cells)
    assert weights == [1.0, 7 / 3, 1.0]
    assert 3 * weights[1] == pytest.approx(7)


def test_a_label_of_every_example_stays_in_the_loss():
    task = task_of(MultiLabelClassification)
    assert task.class_weights("balanced", [["food"], ["food", "sport"]]) == [1.0, 1.0, 1.0]


# ---- the loss


@pytest.mark.parametrize("kind", [SingleLabelClassification, MultiLabelClassification])
def test_the_weighted_loss_is_that_of_torch(kind):
    logits, labels = rows(kind)
    weights = torch.tensor([0.5, 3.0, 1.0], dtype=torch.double)
    value = task_of(kind).weighted_label_loss(logits, labels, weights)
    if kind is SingleLabelClassification:
        expected = functional.cross_entropy(logits, labels, weights, reduction="none")
    else:
        expected = functional.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="none"
        ).mean(-1)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [SingleLabelClassification, MultiLabelClassification])
def test_weights_of_1_change_no_bit_and_a_row_without_a_label_costs_nothing(kind):
    task, (logits, labels) = task_of(kind), rows(kind)
    logits = logits.float()
    assert torch.equal(
        task.weighted_label_loss(logits, labels, torch.ones(3)), task.label_loss(logits, labels)
    )
    labels[3] = -100 if kind is SingleLabelClassification else math.nan
    logits.requires_grad_()
    values = task.weighted_label_loss(logits, labels, torch.tensor([2.0, 3.0, 4.0]))
    values.sum().backward()
    assert values[3] == 0
    assert logits.grad[3].eq(0).all()


def test_a_weight_of_2_is_as_good_as_two_examples():
    task, (logits, labels) = task_of(), rows(SingleLabelClassification)
    twice = torch.cat([torch.arange(len(labels)), (labels == 1).nonzero()[:, 0]])
    weighted = task.weighted_label_loss(logits, labels, torch.tensor([1.0, 2.0, 1.0]).double())
    torch.testing.assert_close(weighted.sum(), task.label_loss(logits[twice], labels[twice]).sum())


def test_the_module_weighs_the_supervised_part_alone():
    made = world()
    made.task.names = names = tuple(made.task.names)
    weights = {name: float(place + 1) for place, name in enumerate(names)}

    def module(**loss):
        student = made.model("student", seed=1)
        return Distillation(made.task, student, made.model(), config.Loss(**loss)).eval()

    plain, weighted = module(), module(class_weights=weights)
    batch = next(iter(made.loader()))
    before, after = plain.parts(batch), weighted.parts(batch)
    assert torch.equal(before["divergence"], after["divergence"])
    factors = torch.tensor([*weights.values()])[batch.labels]
    rows_NC = made.task.select_rows(plain.student(**batch.inputs).logits, batch)
    expected = (made.task.label_loss(rows_NC, batch.labels) * factors).mean()
    torch.testing.assert_close(after["supervised"], expected)
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    with pytest.raises(UserError, match="no training labels to count"):
        module(class_weights="balanced")


def test_balanced_weights_are_counted_on_the_training_split(caplog):
    run = tiny(loss={"class_weights": "balanced"}, data={"labelled": 30})
    with caplog.at_level("INFO", logger="distill"):
        prepared = prepare_run(run)
    labels = [label for label in prepared.raw["train"]["label"] if label is not None]
    names = prepared.task.names
    assert len(labels) == 30
    assert prepared.class_weights == [30 / (len(names) * labels.count(name)) for name in names]
    assert "class weights of the loss" in caplog.text


# ---- stored results


def test_weights_are_an_ingredient_of_a_fine_tuned_teacher_only_if_set():
    def entry(**loss):
        made = world(teacher={"finetune": {"epochs": 1, "lr": 1e-3}}, loss=loss)
        train = data.only_labelled(made.examples["train"], made.task)
        labelled = made.examples | {"train": train}
        key = teacher._ingredients(made.run, made.task, labelled, made.model())
        return key, store.entry_path("teachers", key)

    (plain, first), (_, second), (_, third) = (
        entry(),
        entry(class_weights="balanced"),
        entry(class_weights=[1.0, 2.0, 1.0, 1.0]),
    )
    assert len({first, second, third}) == 3
    assert "class weights" not in plain


def test_other_weights_are_another_run():
    one, other = (tiny(loss={"class_weights": [1.0, 1.0, 1.0, each]}) for each in (2.0, 3.0))
    (changed,) = resume.differences(one, other)
    assert changed == "loss.class_weights"
    assert resume._repeated_by(changed, 2.0, 3.0) is None


@pytest.mark.parametrize("outputs", ["cached", "online"])
def test_balanced_weights_reach_teacher_and_student(outputs, tmp_path, monkeypatch):
    losses = []

    class Stop(Exception):
        pass

    def fit(training):
        losses.append(training.module.label_loss.weights_C.tolist())
        if len(losses) == 2:
            raise Stop
        return

    monkeypatch.setattr(loop, "fit", fit)
    section = {"finetune": {"epochs": 1, "lr": 1e-3}, "outputs": outputs}
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    with pytest.raises(Stop):
        train(tiny(teacher=section, loss={"class_weights": "balanced"}), tmp_path / "run")
    # The generated topics are equally frequent.
    assert losses == [pytest.approx([1.0] * 4, rel=0.05)] * 2
