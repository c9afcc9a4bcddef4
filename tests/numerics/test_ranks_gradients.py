"""A run on several processes is the run on one: the same gradients, losses and metrics."""

import os

import lightning as L
import pytest
import torch

from distill import data
from distill.module import Distillation
from distill.processes import fsdp, ranks
from distill.processes.strategy import lightning_strategy
from distill.recipe import config
from distill.training import loop
from tests.processes import on_ranks
from tests.worlds import LANGUAGE, Rows, world

pytestmark = pytest.mark.slow

TERMS = {
    "hidden": {"_target_": "distill.terms.HiddenStates", "weight": 0.7, "layers": {0: 1, 1: 2}},
    "relations": {
        "_target_": "distill.terms.AttentionRelations",
        "weight": 0.3,
        "student_layer": 0,
        "teacher_layer": 1,
        "heads": 2,
    },
}
WITHOUT_DROPOUT = {  # and the shape of the student
    False: (
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        {"num_hidden_layers": 2},
    ),
    True: ({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, {"n_layer": 2}),
}
PROJECTED = "terms with projections"  # which compute in float32
BATCH = 8
CASES = {  # task, examples, micro-batches, terms, validation examples
    "classification": ({}, 21, 1, {}, 50),
    "classification, accumulated": ({}, 21, 3, {}, 50),
    "fewer left over than ranks": ({}, 17, 1, {}, 1),
    "fewer left over than ranks, accumulated": ({}, 17, 3, {}, 17),
    "smaller micro-batches than ranks": ({}, 13, 8, {}, 33),
    "language": (LANGUAGE, 21, 1, {}, 50),
    "language, accumulated": (LANGUAGE, 17, 3, {}, 50),
    "terms": ({}, 21, 1, TERMS, 50),
    "terms, accumulated": ({}, 17, 3, TERMS, 20),
    PROJECTED: ({}, 17, 3, TERMS, 20),
    "language, terms": (LANGUAGE, 21, 3, {"hidden": TERMS["hidden"]}, 20),
}
WORLDS = (("auto", 2), ("auto", 3), ("fsdp", 2))


class Recorder(L.Callback):
    """Collects the gradient of each optimizer step and the metrics of each validation run."""

    def __init__(self):
        self.gradients, self.metrics, self.wrapped = [], [], []

    def on_train_start(self, trainer, module):
        self.wrapped = sorted(name for name, _ in trainer.strategy.model.named_parameters())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [
            fsdp.full_tensors(parameter.grad)
            for parameter in module.parameters()
            if parameter.grad is not None
        ]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))

    def on_validation_epoch_end(self, trainer, module):
        self.metrics.append(
            {
                name: value.item()
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
        )


def trained(case, strategy="auto"):
    changes, examples, accumulate, terms, validation = CASES[case]
    made = world(**changes)
    dropout, shape = WITHOUT_DROPOUT["language" in case]
    shape = shape | ({"hidden_size": 32} if case == PROJECTED else {})
    teacher, student = (
        made.model(seed=1, **dropout).double(),
        made.model("student", seed=2, **dropout, **shape).double(),
    )
    module = Distillation(
        made.task,
        student,
        teacher,
        config.Loss(alpha=0.4, terms=terms, chunk=7),
        config.Optimizer(),
        3,
    ).double()
    for term in module.terms.values():
        for projection in getattr(term, "projections", {}).values():
            projection.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    module.settings.lr = 1e-30  # the weights stay, so that gradients do not depend on earlier steps
    processes = {"rank": ranks.rank(), "world": ranks.world_size()}
    train = data.make_loader(
        made.examples["train"].select(range(examples)),
        made.task,
        made.pad_id,
        data.Batching(BATCH, accumulate, seed=0, **processes),
    )
    validation_batches = data.make_loader(
        made.examples["validation"].select(range(validation)),
        made.task,
        made.pad_id,
        data.Batching(16, **processes),
    )
    recorder, written = Recorder(), Rows()
    trainer = L.Trainer(
        **lightning_strategy(config.Trainer(accelerator="cpu", strategy=strategy)),
        precision="64-true"
        if strategy == "auto"
        else "32-true",  # which leaves the models in float64, as they are
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[recorder],
        logger=[written],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    with loop.silence_lightning():
        trainer.fit(module, train, validation_batches)
    results = {name: getattr(recorder, name) for name in ("gradients", "metrics", "wrapped")}
    results["logged"] = [row for row in written.rows if "train/loss" in row]
    return results | {
        "steps": trainer.global_step,
        "parameters": sorted(name for name, _ in module.named_parameters()),
    }


def all_cases(folder, strategy="auto"):
    os.environ["DISTILL_CACHE"] = str(folder / f"store {ranks.rank()}")
    return {case: trained(case, strategy) for case in CASES}


def all_cases_split(folder):
    return all_cases(folder, "fsdp")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, _module_store):
    return {case: trained(case) for case in CASES}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]} {world[1]}")
def together(request, tmp_path_factory):
    strategy, count = request.param
    return on_ranks(
        all_cases_split if strategy == "fsdp" else all_cases,
        tmp_path_factory.mktemp("ranks"),
        count,
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, alone, together):
    for rank in together:
        assert rank[case]["steps"] == alone[case]["steps"] == -(-CASES[case][1] // BATCH)
        for actual, expected in zip(rank[case]["gradients"], alone[case]["gradients"], strict=True):
            assert actual.dtype == torch.float64
            assert expected.abs().max() > 1e-3
            rtol = 1e-6 if case == PROJECTED else 1e-12
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=0.1 * rtol * expected.abs().max().item()
            )


@pytest.mark.parametrize("case", CASES)
def test_logged_values_are_those_of_the_whole_batch(case, alone, together):
    for rank in together:
        assert len(rank[case]["logged"]) == rank[case]["steps"]
        for actual, expected in zip(rank[case]["logged"], alone[case]["logged"], strict=True):
            assert (
                {
                    "train/loss",
                    "train/supervised",
                    "train/divergence",
                    "train/grad_norm",
                    "train/lr",
                }
                <= actual.keys()
                == expected.keys()
            )
            assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_the_whole_split_to_the_last_bit(case, alone, together):
    assert len(alone[case]["metrics"]) == 1
    for rank in together:
        assert rank[case]["metrics"] == alone[case]["metrics"]


@pytest.mark.parametrize("case", CASES)
def test_no_replica_contains_the_teacher(case, together):
    for rank in together:
        assert [name.removeprefix("module.") for name in rank[case]["wrapped"]] == rank[case][
            "parameters"
        ]
        assert all(name.startswith(("student.", "terms.")) for name in rank[case]["parameters"])
