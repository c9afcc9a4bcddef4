"""AdamW with moments of 8 bits, and gradient checkpointing."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from distill import models, training
from distill.errors import UserError
from distill.models import frozen_weights
from distill.module import low_bit_optimizer
from distill.recipe import compose, config
from distill.train import train
from distill.training import checkpoint_writer
from tests.worlds import LANGUAGE, tiny

pytest.importorskip("torchao.optim")


@pytest.fixture
def eager(monkeypatch):
    """torchao compiles each step; what it computes is the same without."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)


def run_with(bits=8, **changes):
    run = tiny(**LANGUAGE)
    run.teacher.config |= {"n_embd": 64}  # its matrices are large enough for blocks
    run.trainer.max_steps, run.export.format = 6, None
    run.trainer.checkpoint.steps = 2
    run.optimizer = replace(run.optimizer, bits=bits)
    for key, value in changes.items():
        setattr(run.student, key, value)
    return run


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def weights(folder):
    return (folder / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(eager, tmp_path, monkeypatch):
    train(run_with(), tmp_path / "whole")
    build = training.build_callbacks
    monkeypatch.setattr(training, "build_callbacks", lambda *_: [Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        train(run_with(), tmp_path / "resumed")
    monkeypatch.setattr(training, "build_callbacks", build)
    train(run_with(), tmp_path / "resumed")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    train(run_with(bits=32), tmp_path / "full")
    assert weights(tmp_path / "full") != weights(tmp_path / "whole")


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_byte(tmp_path):
    train(run_with(bits=32), tmp_path / "plain")
    train(run_with(bits=32, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert weights(tmp_path / "plain") == weights(tmp_path / "checkpointed")


def test_steps_are_nearly_those_of_adamw(eager):
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 128), torch.randn(20, 64, 128)
    ends = {}
    for name in ("8", "32"):
        weight = torch.nn.Parameter(start.clone())
        groups = [{"params": [weight], "weight_decay": 0.01}]
        optimizer = (
            low_bit_optimizer.adamw_8bit(groups, 1e-3)
            if name == "8"
            else torch.optim.AdamW(groups, 1e-3)
        )
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends[name] = weight.detach() - start
    assert (ends["8"] - ends["32"]).norm() < 0.05 * ends["32"].norm()


def test_the_state_takes_two_bytes_a_weight_and_is_restored_exactly(eager, tmp_path):
    def stepped(weight, optimizer, count):
        for step in range(count):
            weight.grad = torch.full_like(weight, 0.1 * (step + 1))
            optimizer.step()

    first = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = low_bit_optimizer.adamw_8bit([{"params": [first]}], 1e-3)
    stepped(first, optimizer, 3)
    sizes = [optimizer.state[first][name].codes.nbytes for name in ("exp_avg", "exp_avg_sq")]
    assert sizes == [first.numel()] * 2
    torch.save(optimizer.state_dict(), tmp_path / "state")
    second = torch.nn.Parameter(first.detach().clone())
    restored = low_bit_optimizer.adamw_8bit([{"params": [second]}], 9.0)
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for weight, each in ((first, optimizer), (second, restored)):
        stepped(weight, each, 2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_a_learning_rate_stays_the_object_that_the_optimizer_needs(lr):
    group = {"lr": lr}
    low_bit_optimizer.set_lr(group, 0.25)
    assert group["lr"] == 0.25
    assert type(group["lr"]) is type(lr)


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match=r"optimizer.bits is 16"):
        config.Optimizer(bits=16)
    with pytest.raises(UserError, match=r"optimizer.bits is 8.* callbacks.prune"):
        low_bit_optimizer.check_low_bits(8, ["callbacks.prune"])
    monkeypatch.setattr(frozen_weights, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"optimizer.bits is 8, but torchao"):
        low_bit_optimizer.check_low_bits(8, [])
    low_bit_optimizer.check_low_bits(32, ["callbacks.prune"])
    sharded = config.Trainer(strategy="fsdp")
    with pytest.raises(UserError, match=r"optimizer.bits is 8.*trainer.strategy=fsdp"):
        compose._check_trainer(sharded, config.Optimizer(bits=8), 32)


def test_a_model_without_blocks_that_can_be_computed_again_is_refused():
    model = torch.nn.Linear(1, 1)
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="student.gradient_checkpointing is true, but Linear"):
        models.set_checkpointing(model, True)


def test_a_checkpoint_holds_a_copy_of_the_moments(eager):
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = low_bit_optimizer.adamw_8bit([{"params": [weight]}], 1e-3)

    def step(number):
        weight.grad = torch.full_like(weight, number)
        optimizer.step()
        return optimizer.state_dict()["state"][0]["exp_avg"]

    moments = step(1.0)
    before = moments.dequantize()
    copy = checkpoint_writer.snapshot({"moments": moments})["moments"]
    assert not torch.equal(step(-9.0).dequantize(), before)
    assert torch.equal(copy.dequantize(), before)
