"""The same way on a GPU: run with `pytest -m gpu -n 0` where there is one.

One process makes all runs but one: what evaluates and exports a student would otherwise import
torch and start CUDA in a process of its own for each.
"""

import json

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.nn.utils import parameters_to_vector

from distill import isolated
from distill.isolated import warm
from distill.module import Distillation
from distill.processes.fsdp import ShardedStrategy, full_tensors
from distill.recipe import config
from distill.train import train
from tests import worlds
from tests.processes import on_ranks
from tests.unit.test_module import fitted
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, LLAMA, tiny

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
    "grouped keys": LLAMA,
}


RUNS = [(kind, "bf16-mixed") for kind in KINDS] + [
    (kind, precision)
    for kind in ("cached", "language model")
    for precision in ("32-true", "16-mixed")
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "precision"), RUNS)
def test_every_kind_of_run_ends_with_a_proven_student(kind, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", run_here)
    monkeypatch.setattr(warm, "is_supported", lambda: False)  # nor a process for them all
    train_and_check(tiny(**KINDS[kind]), precision, tmp_path)


@pytest.mark.gpu
def test_a_run_with_its_own_processes_ends_with_a_proven_student(tmp_path):
    metrics = train_and_check(tiny(), "bf16-mixed", tmp_path)
    assert metrics["student"]["cost"]["device_peak_bytes"] > 0


def train_and_check(run, precision, folder):
    run.trainer.accelerator, run.trainer.precision = "gpu", precision
    metrics = train(run, folder)
    assert json.loads((folder / "export" / "proof.json").read_text())["agreement"] >= 0.99
    return metrics


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
    module, recorded = Distillation(made.task, student, teacher, *settings, 2), Devices()
    worlds.trainer(2, recorded, accelerator="gpu").fit(module, made.loader())
    assert recorded.training == {"cuda"}
    assert devices(module) == {"cpu"}


class NoWaits(L.Callback):
    """Lets every CPU-GPU sync point in steps that are not logged raise an error."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, *_):
        logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        if trainer.global_step >= 3 and not logged:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, *_):
        torch.cuda.set_sync_debug_mode("default")
        trainer.should_stop = self.steps == 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("family", [{}, LANGUAGE, LLAMA], ids=["bert", "gpt2", "llama"])
def test_no_step_waits_for_the_gpu(family, tmp_path):
    made = worlds.world(**family)
    models = made.model("student", seed=1), made.model()
    module = Distillation(made.task, *models, config.Loss(), config.Optimizer(), 200)
    counted = NoWaits()
    settings = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 200}
    fitted(made, tmp_path, module, [counted], validations=1, **settings)
    assert counted.steps == 4


RATE = 1e-3


class LastWeights(L.Callback):
    """The student's weights after training, gathered from its shards."""

    def on_train_end(self, trainer, module):
        parameters = full_tensors([*module.student.parameters()])
        self.weights = parameters_to_vector(parameters).detach().cpu()


def trained_alone(folder):
    """The student's weights before and after three steps with NCCL's only rank, by strategy."""
    made = worlds.world()
    distributed.init_process_group("cpu:gloo,cuda:nccl")
    still = worlds.STILL["bert"]
    weights = [parameters_to_vector(made.model("student", seed=1).parameters()).detach()]
    for chosen in (DDPStrategy(cluster_environment=TorchElasticEnvironment()), ShardedStrategy()):
        models = made.model("student", seed=1, **still), made.model(**still)
        optimizer = config.Optimizer(lr=RATE, warmup=0)
        module = Distillation(made.task, *models, config.Loss(), optimizer, 3)
        options, last = {"accelerator": "gpu", "devices": 1, "strategy": chosen}, LastWeights()
        worlds.trainer(3, last, **options).fit(module, made.loader())
        weights.append(last.weights)
    return weights


@pytest.mark.gpu
def test_nccl_s_only_rank_trains_with_ddp_and_sharded(tmp_path):
    ((start, ddp, sharded),) = on_ranks(trained_alone, tmp_path, 1)
    assert (ddp - start).abs().mean() > 0.1 * RATE
    assert (ddp - sharded).abs().mean() < 0.01 * RATE
