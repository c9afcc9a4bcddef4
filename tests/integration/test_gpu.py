"""The same way on a GPU: run with `pytest -m gpu` where there is one."""

import json

import lightning as L
import pytest

from distill.module import Distillation
from distill.recipe import config
from distill.train import train
from tests import worlds
from tests.worlds import LANGUAGE, tiny

KINDS = {
    "cached": {},
    "online": {"teacher": {"outputs": "online"}},
    "fine-tuned teacher": {"teacher": {"finetune": {"epochs": 0.2, "lr": 1e-3}}},
    "hidden states": {
        "teacher": {"outputs": "online"},
        "loss": {
            "terms": {
                "hidden": {
                    "_target_": "distill.terms.HiddenStates",
                    "weight": 1.0,
                    "layers": {0: 0, 1: 2},
                }
            }
        },
    },
    "language model": LANGUAGE,
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_run_ends_with_a_proven_student(changes, precision, tmp_path):
    run = tiny(**changes)
    run.trainer.accelerator, run.trainer.precision = "gpu", precision
    metrics = train(run, tmp_path)
    assert metrics["student"]["cost"]["device_peak_bytes"] > 0
    assert json.loads((tmp_path / "export" / "proof.json").read_text())["agreement"] >= 0.99


class Devices(L.Callback):
    """Records the devices of student and teacher while they train."""

    def __init__(self):
        self.training = set()

    def on_train_batch_end(self, trainer, module, *_):
        self.training |= devices(module)


def devices(module):
    models = (module.student, *module._teacher)
    return {parameter.device.type for model in models for parameter in model.parameters()}


@pytest.mark.gpu
def test_student_and_teacher_train_on_the_gpu_and_return_to_the_cpu():
    made = worlds.world()
    student, teacher = made.model("student", seed=1), made.model()
    settings = (config.Loss(), config.Optimizer())
    module, recorded = Distillation(made.task, student, teacher, *settings, 2, None), Devices()
    worlds.trainer(2, recorded, accelerator="gpu").fit(module, made.loader())
    assert recorded.training == {"cuda"}
    assert devices(module) == {"cpu"}
