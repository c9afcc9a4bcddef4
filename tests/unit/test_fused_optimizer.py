"""The optimizer with and without one kernel for many weights."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from distill import student, teacher
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import compose, config
from distill.training.loggers import Tracker
from tests.worlds import LANGUAGE, few, tiny, trainer


@pytest.fixture(scope="module")
def made(_module_store):
    return few(**LANGUAGE)


def trained(made, fused, precision="32-true"):
    """The student after some steps whose gradients are clipped."""
    teacher, student = made.model(), made.model("student", seed=1, n_layer=1)
    optimizer = config.Optimizer(lr=1e-2, clip=0.1, fused=fused)
    module = Distillation(made.task, student, teacher, config.Loss(), optimizer, 4)
    fit = trainer(4, precision=precision)
    fit.fit(module, made.loader())
    assert {group["fused"] for group in fit.optimizers[0].param_groups} == {fused is not False}
    return torch.cat([tensor.detach().flatten() for tensor in student.parameters()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_steps_are_those_of_the_plain_optimizer(made, precision):
    plain, fused, default = (trained(made, each, precision) for each in (False, True, None))
    assert torch.equal(fused, default)
    start = torch.cat([t.flatten() for t in made.model("student", seed=1, n_layer=1).parameters()])
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    assert (plain - fused).norm() < tolerance * (plain - start).norm()


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_training_ends_with_the_same_bytes(made, tmp_path, fused):
    def fit(folder, *callbacks):
        run = replace(made.run, optimizer=replace(made.run.optimizer, fused=fused))
        run.trainer.max_steps, run.trainer.checkpoint.steps = 4, 2
        tracker = Tracker(run, folder)
        model = teacher.obtain(run, made.prepared, folder, tracker)
        student.train_student(run, made.prepared, model, [*callbacks], folder, tracker)
        return (folder / "student" / "model.safetensors").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "resumed", Interrupt())
    assert fit(tmp_path / "resumed") == fit(tmp_path / "whole")


def test_refusals(made):
    with pytest.raises(UserError, match=r"optimizer\.fused is true, but optimizer\.bits is 8"):
        config.Optimizer(fused=True, bits=8)
    config.Optimizer(fused=False, bits=8)
    with pytest.raises(UserError, match=r"optimizer\.fused is true.*trainer\.precision=16-mixed"):
        tiny(optimizer={"fused": True}, trainer={"precision": "16-mixed"})
    run = compose.load_recipe("tiny")
    assert run.optimizer.fused is None
