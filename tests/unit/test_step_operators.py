"""A step does what a bare loop of the same mathematics does, and waits for no device."""

from collections import Counter
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_scheduler

from distill import data, teacher
from distill.module import Distillation
from distill.processes import ranks
from distill.recipe import config
from distill.training import Training, loop
from tests.processes import on_ranks
from tests.unit.test_module import fitted
from tests.worlds import LANGUAGE, LLAMA, world

WORLDS = {"bert": {}, "gpt2": LANGUAGE, "llama": LLAMA}
LAYERS = {"bert": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers"}
KINDS = [(family, outputs) for family in WORLDS for outputs in ("cached", "online", "hidden")]
KINDS.remove(("bert", "hidden"))  # its teacher's logits are as small as its hidden states
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item"}
ALPHA, TEMPERATURE = 0.3, 2.0


class Operators(TorchDispatchMode):
    """Counts operators that compute a tensor, and those that ask one for its value."""

    def __init__(self):
        super().__init__()
        self.computing, self.waiting, self.collective = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        name, returns = operator.name().partition(".")[0], operator._schema.returns
        views = any(each.alias_info and not each.alias_info.is_write for each in returns)
        if operator.namespace == "c10d":
            self.collective[name] += 1
        elif name in WAITS:
            self.waiting[name] += 1
        elif not views and any(
            isinstance(each, Tensor) for each in torch.utils._pytree.tree_leaves(result)
        ):
            self.computing[name] += 1
        return result


class OneStep(L.Callback):
    """Counts the operators between the starts of two steps, of which none is logged."""

    def __init__(self, step=3):
        self.step, self.operators = step, Operators()

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            assert trainer.log_every_n_steps > self.step + 1
            self.operators.__enter__()
        if trainer.global_step == self.step + 1:
            self.operators.__exit__(None, None, None)
            trainer.should_stop = True


@pytest.fixture(scope="module")
def worlds():
    return {}


def prepared(worlds, family, outputs):
    """A world with the teacher's outputs in its training split, and the teacher."""
    if family not in worlds:
        worlds[family] = world(**WORLDS[family])
    made = worlds[family]
    model = made.model(**{LAYERS[family]: 12})  # those of GPT-2, and of DistilGPT2
    examples = made.examples["train"].select(range(96))  # six steps
    if outputs != "online":
        run = replace(made.run, teacher=replace(made.run.teacher, outputs=outputs))
        few = replace(made.prepared, examples=type(made.examples)(train=examples))
        examples = teacher.with_outputs(run, few, model).examples["train"]
    return replace(made, examples=type(made.examples)(made.examples | {"train": examples})), model


def student_of(made, family):
    return made.model("student", seed=1, **{LAYERS[family]: 6})


def operators_of_ours(made, model, family, outputs, folder):
    part = {"online": model, "hidden": model.get_output_embeddings(), "cached": None}[outputs]
    settings = config.Loss(alpha=ALPHA, temperature=TEMPERATURE), config.Optimizer(lr=1e-3)
    module = Distillation(made.task, student_of(made, family), part, *settings)
    counted = OneStep()
    fitted(made, folder, module, [counted], max_steps=200, validations=1)
    return counted.operators


def operators_of_a_bare_loop(made, model, family, outputs):
    student = student_of(made, family).train()
    matrices = [each for each in student.parameters() if each.ndim > 1]
    vectors = [each for each in student.parameters() if each.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    schedule = get_scheduler("linear", optimizer, 10, 200)
    head = model.get_output_embeddings()
    options = {} if family == "bert" else {"use_cache": False}

    def step(batch):
        logits_NC = made.task.select_rows(student(**batch.inputs, **options).logits, batch)
        with torch.no_grad():
            if outputs == "cached":
                teacher_NC = batch.teacher
            elif outputs == "hidden":
                teacher_NC = head(batch.teacher.states_ND)
            else:
                teacher_NC = made.task.select_rows(model(**batch.inputs, **options).logits, batch)
        supervised = F.cross_entropy(logits_NC, batch.labels, reduction="sum")
        log_q, log_p = ((each / TEMPERATURE).log_softmax(-1) for each in (logits_NC, teacher_NC))
        divergence = TEMPERATURE**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        (ALPHA * supervised + (1 - ALPHA) * divergence).div(batch.rows).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    batches = iter(made.loader(seed=0))
    for _ in range(3):
        step(next(batches))
    batch = next(batches)
    with Operators() as operators:
        step(batch)
    return operators


@pytest.mark.parametrize(("family", "outputs"), KINDS)
def test_a_step_computes_as_much_as_a_bare_loop_and_asks_for_no_value(
    worlds, family, outputs, tmp_path
):
    made, model = prepared(worlds, family, outputs)
    ours = operators_of_ours(made, model, family, outputs, tmp_path)
    bare = operators_of_a_bare_loop(made, model, family, outputs)
    assert not ours.waiting
    ratio = ours.computing.total() / bare.computing.total()
    assert ratio <= 1.05, ours.computing - bare.computing


def collectives(folder):
    """What each rank gathers and reduces in a step that is not logged."""
    made = world()
    batching = data.Batching(16, 1, 0, rank=ranks.rank(), world=ranks.world_size())
    train, validation = (
        data.make_loader(made.examples["train"], made.task, made.pad_id, each)
        for each in (batching, replace(batching, seed=None))
    )
    settings = config.Trainer(
        max_steps=200, validations=1, precision="32-true", accelerator="cpu", progress=False
    )
    models = made.model("student", seed=1), made.model()
    module = Distillation(made.task, *models, config.Loss(), config.Optimizer(), 200)
    counted = OneStep(step=6)
    loop.fit(Training(module, train, validation, settings, folder, [], [counted]))
    return dict(counted.operators.collective)


@pytest.mark.slow
def test_ranks_meet_in_the_buckets_of_the_gradients_alone(tmp_path):
    """And once more in DDP's, for the parameters that no loss reaches."""
    assert on_ranks(collectives, tmp_path, 2) == [{"c10d::allreduce_": 2}] * 2
