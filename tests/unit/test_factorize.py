"""Factorization during training: which layers become factors, and that training continues."""

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.callbacks import factorize
from distill.callbacks.factorize import Factorize
from distill.compress import low_rank
from distill.errors import UserError
from distill.models import logits
from distill.module import Distillation
from distill.recipe import config
from distill.remote_code.modeling import CompressionConfig, LowRank
from distill.training import loop
from tests.worlds import LANGUAGE, STILL, few, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

EPOCH = 4  # steps


@pytest.fixture(scope="module")
def bert(_module_store):
    return few()


@pytest.fixture(scope="module")
def gpt2(_module_store):
    return few(**LANGUAGE)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def made(request):
    return request.getfixturevalue(request.param)


def module_of(made, steps=8):
    student = made.model("student", seed=1, **STILL[made.run.teacher.config["model_type"]])
    return Distillation(
        made.task, student, made.model(), config.Loss(), config.Optimizer(lr=1e-2), steps
    )


def trained(made, *callbacks, module=None, resume=None):
    module = module or module_of(made)
    with loop.silence_lightning():
        trainer(module.steps, *callbacks, limit_val_batches=0).fit(
            module, made.loader(seed=0), made.loader("validation"), ckpt_path=resume
        )
    return module


def layers_of(student):
    return {name: layer for name, layer in student.named_modules() if isinstance(layer, LowRank)}


class Around(L.Callback):
    """Student and optimizer state right before and after the step of factorization."""

    def __init__(self, step):
        self.step, self.before, self.after = step, None, None

    def look(self, module):
        state = module.trainer.optimizers[0].state
        student = module.student
        moments = {
            name: state[each]["exp_avg"].clone()
            for name, each in student.named_parameters()
            if each in state
        }
        weights = {name: (each, each.detach().clone()) for name, each in student.named_parameters()}
        return weights, moments

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            self.after = self.look(module)


class Before(Around):
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            self.before = self.look(module)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_layers_of_the_blocks_become_factors(made, weighted):
    module = trained(made, Factorize(rank=3, weighted=weighted, start=0.5))
    found = layers_of(module.student)
    per_block = 6 if made.run.teacher.config["model_type"] == "bert" else 4
    assert len(found) == 3 * per_block
    assert CompressionConfig.from_config(module.student.config).low_rank == dict.fromkeys(found, 3)
    assert not any(isinstance(layer, Conv1D) for layer in module.student.modules())
    for layer in found.values():
        assert layer.first.weight.shape == (3, layer.in_features)
        assert layer.second.weight.shape == (layer.out_features, 3)
    assert all(parameter.isfinite().all() for parameter in module.student.parameters())


@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_answers_as_before(made, weighted, monkeypatch):
    """Nothing is gained then, so that it takes a lie to bring it about."""
    monkeypatch.setattr(low_rank, "saves_parameters", lambda *_: True)
    batch = next(iter(made.loader()))
    module = module_of(made)
    with torch.no_grad():
        expected = logits(module.student.eval(), batch.inputs)
    technique = Factorize(energy=1.0, weighted=weighted, start=8)
    module.student.train()
    module.settings = config.Optimizer(lr=1e-30)
    trained(made, technique, module=module)
    assert len(layers_of(module.student)) >= 12
    with torch.no_grad():
        torch.testing.assert_close(
            logits(module.student.eval(), batch.inputs), expected, rtol=1e-4, atol=1e-4
        )


def test_everything_else_keeps_its_values_and_moments(made):
    before, after = Before(4), Around(4)
    module = trained(made, before, Factorize(rank=3, start=4), after)
    (weights, moments), (now, moments_now) = before.before, after.after
    layers = CompressionConfig.from_config(module.student.config).low_rank
    gone = {f"{name}.weight" for name in layers}
    renamed = {name: name for name in weights if name not in gone} | {
        f"{name}.bias": f"{name}.second.bias" for name in layers
    }
    assert {renamed[name] for name in renamed} == {
        name for name in now if not name.endswith((".first.weight", ".second.weight"))
    }
    for old, new in renamed.items():
        assert now[new][0] is weights[old][0]
        assert torch.equal(now[new][1], weights[old][1])
        assert torch.equal(moments_now[new], moments[old])
        assert moments[old].any() or "bias" in old or "embeddings" in old
    assert moments_now.keys() == set(renamed.values())  # factors have none yet


def test_the_factors_learn(made):
    after = Around(4)
    module = trained(made, Factorize(rank=3, start=4), after)
    then, state = after.after[0], module.trainer.optimizers[0].state
    for name, layer in layers_of(module.student).items():
        for part in ("first", "second"):
            weight = layer.get_submodule(part).weight
            assert not torch.equal(weight, then[f"{name}.{part}.weight"][1])
            assert state[weight]["exp_avg"].any()
    groups = module.trainer.optimizers[0].param_groups
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in module.parameters()}


@pytest.mark.parametrize(
    "arguments", [{"rank": 3}, {"energy": 0.5, "weighted": True}], ids=["rank", "weighted energy"]
)
@pytest.mark.parametrize("start", [2, 6], ids=["resumed after", "resumed before"])
def test_a_run_stopped_at_the_end_of_an_epoch_goes_on_with_the_same_bytes(
    made, tmp_path, arguments, start
):
    def technique():
        return Factorize(start=start, **arguments)

    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=EPOCH, save_top_k=-1)
    whole = trained(made, technique(), kept)
    fresh = module_of(made)
    resumed = trained(made, technique(), module=fresh, resume=tmp_path / f"step={EPOCH}.ckpt")
    assert layers_of(whole.student).keys() == layers_of(resumed.student).keys() != set()
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    states = [
        list(module.trainer.optimizers[0].state_dict()["state"].values())
        for module in (whole, resumed)
    ]
    assert all(
        torch.equal(one[key], other[key]) for one, other in zip(*states, strict=True) for key in one
    )
    assert whole.student.config.compression == resumed.student.config.compression


def test_weighting_keeps_what_the_inputs_need(bert):
    """Weighted factors change the outputs of low-rank inputs less than the plain SVD does."""

    class Outputs(L.Callback):
        def on_fit_start(self, trainer, module):
            self.layer = module.student.get_submodule("bert.encoder.layer.0.intermediate.dense")
            self.weight, self.inputs = self.layer.weight, []
            self.layer.register_forward_pre_hook(
                lambda _, inputs: self.inputs.append(inputs[0].detach().flatten(0, 1))
            )

        def error(self, module):
            layer = module.student.get_submodule("bert.encoder.layer.0.intermediate.dense")
            change = (layer.second.weight @ layer.first.weight - self.weight).detach()
            return float((torch.cat(self.inputs) @ change.T).norm())

    errors = {}
    for weighted in (False, True):
        outputs, module = Outputs(), module_of(bert)
        module.settings = config.Optimizer(lr=1e-30)
        trained(bert, outputs, Factorize(rank=4, weighted=weighted, start=8), module=module)
        errors[weighted] = outputs.error(module)
    assert errors[True] < errors[False]


def test_layers_that_would_not_be_smaller_are_left_and_named_once(bert, caplog):
    with caplog.at_level(logging.INFO, "distill"):
        module = trained(bert, Factorize(rank=9, start=2))
    found = layers_of(module.student)
    assert len(found) == 6
    assert all({layer.in_features, layer.out_features} == {16, 32} for layer in found.values())
    messages = [each.message for each in caplog.records if "unchanged" in each.message]
    assert len(messages) == 1
    assert "12 layers" in messages[0]
    assert "attention.self.query" in messages[0]


def test_energy_that_nothing_can_keep_leaves_the_student_alone(bert):
    module = trained(bert, Factorize(energy=1.0, start=2))
    assert not layers_of(module.student)
    assert not CompressionConfig.from_config(module.student.config).low_rank


def test_chosen_layers_only(bert):
    module = trained(bert, Factorize(rank=2, layers=["*.query", "bert.pooler.dense"], start=2))
    assert {name.rsplit(".", 1)[-1] for name in layers_of(module.student)} == {"query", "dense"}
    assert len(layers_of(module.student)) == 4


def test_two_in_one_recipe_do_not_factorize_factors(bert, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=EPOCH, save_top_k=-1)

    def both():
        first, second = Factorize(rank=2, layers=["*.query"], start=2), Factorize(rank=3, start=6)
        first.name, second.name = "first", "second"
        return first, second

    module = trained(bert, *both(), kept)
    resumed = trained(bert, *both(), module=module_of(bert), resume=tmp_path / f"step={EPOCH}.ckpt")
    for each in (module, resumed):
        ranks = CompressionConfig.from_config(each.student.config).low_rank
        assert sorted(ranks.values()) == [2] * 3 + [3] * 15
        assert not any("first" in name for name in ranks)


def test_a_layer_replaced_while_it_is_watched_is_watched_on(bert):
    class Replace(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                student = module.student
                del student.bert.encoder.layer[0]
                old = student.bert.encoder.layer[0].intermediate.dense
                student.bert.encoder.layer[0].intermediate.dense = nn.Linear(
                    old.in_features, old.out_features
                )
                module.refresh_optimizer_params()

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                self.moments = dict(technique._moments)

    technique, count = Factorize(rank=2, weighted=True, start=6), Count()
    module = trained(bert, Replace(), technique, count)
    assert count.moments.keys() == layers_of(module.student).keys()
    assert len(count.moments) == 12
    first, second = (
        float(count.moments[f"bert.encoder.layer.{i}.intermediate.dense"].trace()) for i in (0, 1)
    )
    assert 0 < first < 0.8 * second  # three batches and five, of normalised inputs


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({}, "rank is None and energy is None"),
        ({"rank": 4, "energy": 0.5}, "rank is 4 and energy is 0.5"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"energy": 0}, "energy is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": "most"}, "energy is most"),
        ({"rank": 4, "start": -1}, "start is -1"),
    ],
)
def test_wrong_arguments_are_refused_when_the_recipe_is_read(arguments, refused):
    with pytest.raises(UserError) as error:
        Factorize(**arguments)
    assert str(error.value).startswith(f"Factorize: {refused}, but ")


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({"rank": 11}, "rank is 11, but .* set rank to 10 or less$"),
        ({"rank": 8, "layers": ["*.query"]}, "rank is 8, but .* set rank to 7 or less$"),
        ({"rank": 2, "layers": ["*.nothing"]}, r"layers has \*\.nothing, but "),
        ({"rank": 2, "weighted": True, "start": 0}, "start is 0, but weighted needs"),
        ({"rank": 2, "weighted": True, "start": 0.01}, "start is 0, but weighted needs"),
        ({"rank": 2, "start": "9 steps"}, "the schedule ends at step 9, but the training has 8"),
    ],
)
def test_what_does_not_fit_the_student_is_refused_before_the_first_step(bert, arguments, refused):
    with pytest.raises(UserError, match=f"^Factorize: {refused}"):
        trained(bert, Factorize(**arguments))


def test_the_output_layer_over_the_vocabulary_is_refused(gpt2):
    with pytest.raises(UserError, match="^Factorize: layers has lm_head, but "):
        trained(gpt2, Factorize(rank=2, layers=["lm_head"]))


def test_a_layer_without_bias_and_one_in_another_mode():
    layer = nn.Linear(6, 5, bias=False).eval()
    left, _ = low_rank.spectrum(factorize.weight_of(layer))
    made = factorize.factorized(layer, *low_rank.factors(factorize.weight_of(layer), left))
    assert made.second.bias is None
    assert not made.training
    x = torch.randn(3, 6)
    torch.testing.assert_close(made(x), layer(x))
