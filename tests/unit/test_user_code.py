"""Functions of the user are called once before training, and what they return is checked."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from distill import losses
from distill.errors import UserError
from distill.module import resolve_divergence
from distill.recipe import config, targets
from distill.tasks import Regression, SingleLabelClassification
from distill.tasks.labels import Labels
from distill.tasks.trial import check_monitors, try_task

TASK = SingleLabelClassification().with_labels(Labels(names=("a", "b", "c")))


def mean(student, teacher, temperature):
    return losses.forward_kl(student, teacher, temperature).mean()


def one(student, teacher, temperature):
    return losses.forward_kl(student, teacher, temperature).mean()[None]


def square(student, teacher, temperature):
    return (student - teacher) ** 2


def transposed(student, teacher, temperature):
    return ((student - teacher) ** 2).mean(0)


def nothing(student, teacher, temperature):
    return None


def numbers(student, teacher, temperature):
    return [0.0] * len(student)


def integers(student, teacher, temperature):
    return (student - teacher).abs().sum(-1).long()


def detached(student, teacher, temperature):
    return losses.forward_kl(student.detach(), teacher, temperature)


def not_finite(student, teacher, temperature):
    return losses.forward_kl(student, teacher, temperature).log() * 0 / 0


def raises(student, teacher, temperature):
    raise KeyError("missing here")


def two_arguments(student, teacher):
    return student.sum(-1)


def right(student, teacher, temperature):
    return losses.forward_kl(student, teacher, temperature)


WRONG = (mean, one, square, transposed, nothing, numbers, integers, detached, not_finite, raises,
         two_arguments)  # fmt: skip


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_a_wrong_divergence_is_refused_before_training(function, classes):
    names = tuple("abcdefg"[:classes])
    task = TASK.with_labels(Labels(names=names)) if classes > 1 else Regression()
    path = f"{__name__}.{function.__name__}"
    with pytest.raises(UserError, match=rf"loss\.divergence is .*{function.__name__}"):
        resolve_divergence(task, config.Loss(divergence=path))


def test_an_error_of_the_user_names_file_and_line():
    with pytest.raises(UserError, match=r"KeyError.*test_user_code\.py, line \d+"):
        resolve_divergence(TASK, config.Loss(divergence=f"{__name__}.raises"))


def test_a_right_divergence_is_the_function_itself_in_value():
    divergence = resolve_divergence(TASK, config.Loss(divergence=f"{__name__}.right"))
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    assert torch.equal(divergence(student, teacher, 2.0), right(student, teacher, 2.0))


def test_trying_a_divergence_draws_no_random_numbers():
    before = torch.get_rng_state()
    resolve_divergence(TASK, config.Loss())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [1e-300, 1e200])
def test_a_temperature_without_finite_losses_is_named(temperature):
    with pytest.raises(UserError, match=r"loss\.temperature is 1e"):
        resolve_divergence(TASK, config.Loss(temperature=temperature))


class Summed(SingleLabelClassification):
    def label_loss(self, logits_NC, labels):
        return super().label_loss(logits_NC, labels).sum()


class Broken(SingleLabelClassification):
    def compute_metrics(self, columns):
        return {"accuracy": columns["no_such_column"].mean()}


EXAMPLES = [
    {"input_ids": [2, 5, 3][:length], "labels": label, "size": 1, "length": length, "rows": 1}
    for length, label in ((3, 0), (2, 2))
]


def test_a_task_is_tried_on_a_few_examples():
    assert "accuracy" in try_task(TASK, EXAMPLES, 0)
    for kind in (Summed, Broken):
        with pytest.raises(UserError, match=rf"task is .*{kind.__name__}"):
            try_task(kind().with_labels(Labels(names=("a", "b", "c"))), EXAMPLES, 0)


def test_a_monitored_metric_must_be_logged():
    metrics = ["accuracy", "f1/a"]
    check_monitors([EarlyStopping("val/accuracy"), L.Callback()], metrics, ["loss"])
    check_monitors([EarlyStopping("val/f1/b"), EarlyStopping("train/loss")], metrics, ["loss"])
    with pytest.raises(UserError, match="val/acuracy.*val/accuracy"):
        check_monitors([EarlyStopping("val/acuracy")], metrics, ["loss"])


class Raises(L.Callback):
    def __init__(self, size):
        self.size = {}[size]


def test_a_constructor_that_raises_names_file_and_line():
    spec = {"_target_": f"{__name__}.Raises", "size": 1}
    with pytest.raises(UserError, match=r"callbacks\.mine is .*KeyError.*test_user_code\.py"):
        targets.instantiate("callbacks.mine", spec, L.Callback)
