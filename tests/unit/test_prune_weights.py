"""Pruning by weight while a student trains: what is removed, when, and that it stays so."""

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.callbacks.compression import Compression
from distill.callbacks.prune_weights import PruneWeights
from distill.compress import masks
from distill.compress.layer_patterns import select_modules
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import config
from distill.remote_code.modeling import CompressionConfig, LowRank
from distill.training import loop
from tests.worlds import LANGUAGE, STILL, few, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
RAMP = {"start": 2, "end": 6, "every": 1}


@pytest.fixture(scope="module")
def bert(_module_store):
    return few()


@pytest.fixture(scope="module")
def gpt2(_module_store):
    return few(**LANGUAGE)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def made(request):
    return request.getfixturevalue(request.param)


def module_of(made, steps=8, **optimizer):
    student = made.model("student", seed=1, **STILL[made.run.teacher.config["model_type"]])
    return Distillation(
        made.task,
        student,
        made.model(),
        config.Loss(),
        config.Optimizer(**({"lr": 1e-2, "weight_decay": 0.1} | optimizer)),
        steps,
    )


def trained(
    made, *callbacks, module=None, resume=None, precision="32-true", accumulate=1, validate=True
):
    module = module or module_of(made)
    loaders = (
        made.loader(seed=0, accumulate=accumulate),
        made.loader("validation") if validate else None,
    )
    with loop.silence_lightning():
        trainer(
            module.steps, *callbacks, precision=precision, accumulate_grad_batches=accumulate
        ).fit(module, *loaders, ckpt_path=resume)
    return module


def weights_of(module, prune):
    """(weight, mask) of each pruned layer, oriented (O, I)."""
    found = {}
    for name, mask in prune.masks.items():
        layer = module.student.get_submodule(name.removesuffix(".weight"))
        pair = layer.weight.detach(), mask
        found[name] = tuple(tensor.T for tensor in pair) if isinstance(layer, Conv1D) else pair
    return found


class Spy(L.Callback):
    """Looks at the zeros after each optimizer step; to be listed after the technique."""

    def __init__(self, prune):
        self.prune, self.masks, self.kept = prune, {}, {}

    def on_train_batch_end(self, trainer, module, *_):
        state = trainer.optimizers[0].state
        for name, mask in self.prune.masks.items():
            weight = module.student.get_parameter(name)
            assert (weight[~mask] == 0).all() and not weight[~mask].signbit().any()
            for key in ("exp_avg", "exp_avg_sq"):
                assert (state[weight][key][~mask] == 0).all()
                assert (state[weight][key] != 0).any() or not mask.any() or weight.grad is None
        self.masks[trainer.global_step] = {
            name: mask.clone() for name, mask in self.prune.masks.items()
        }


def removed(found):
    return sum(int((~mask).sum()) for mask in found.values())


# ---- what is removed


@pytest.mark.parametrize(
    ("score", "scope", "sparsity"),
    [
        ("magnitude", "layer", 0.35),
        ("magnitude", "global", 0.99),
        ("movement", "layer", 0.9),
        ("movement", "row", 0.35),
        ("wanda", "row", 0.77),
        ("wanda", "global", 0.35),
    ],
)
def test_the_sparsity_asked_is_reached_to_the_parameter_and_stays(made, score, scope, sparsity):
    prune = PruneWeights(sparsity=sparsity, score=score, scope=scope, **RAMP)
    spy = Spy(prune)
    module = trained(made, prune, spy)
    inside = {f"{name}.weight" for name in select_modules(module.student, None)}
    assert set(prune.masks) == inside and len(inside) >= 8
    for step, found in spy.masks.items():
        share = sparsity * prune.schedule.at(step, 8)
        sizes = [mask.numel() for mask in found.values()]
        if scope == "global":
            assert removed(found) == round(share * sum(sizes))
        elif scope == "layer":
            assert [int((~mask).sum()) for mask in found.values()] == [
                round(share * size) for size in sizes
            ]
    for weight_OI, mask_OI in weights_of(module, prune).values():
        assert torch.equal(weight_OI != 0, mask_OI)
        if scope == "row":
            assert ((~mask_OI).sum(1) == round(sparsity * mask_OI.shape[1])).all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_zeros_stay_through_every_kind_of_step(bert, precision, accumulate):
    prune = PruneWeights(sparsity=0.7, start=2, shape="one_shot")
    spy, module = Spy(prune), module_of(bert, weight_decay=0.5)
    trained(bert, prune, spy, module=module, precision=precision, accumulate=accumulate)
    assert set(range(1, 9)) <= spy.masks.keys()
    for name, mask in prune.masks.items():
        assert torch.equal(spy.masks[2][name], mask)
        assert int((module.student.get_parameter(name) == 0).sum()) == round(0.7 * mask.numel())


def test_what_is_kept_goes_on_learning(bert):
    class Before(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                self.weights = {
                    name: module.student.get_parameter(name).detach().clone()
                    for name in prune.masks
                }

    prune, before = PruneWeights(sparsity=0.5, start=2, shape="one_shot"), Before()
    module = trained(bert, prune, before)
    for name, mask in prune.masks.items():
        assert (
            module.student.get_parameter(name)[mask] != before.weights[name][mask]
        ).float().mean() > 0.9


def test_what_falls_to_magnitude_was_the_smallest(bert):
    module = module_of(bert, steps=1)
    before = {
        name: parameter.detach().clone() for name, parameter in module.student.named_parameters()
    }
    prune = PruneWeights(sparsity=0.5, start=0, shape="one_shot")
    trained(bert, prune, module=module)
    for name, mask in prune.masks.items():
        assert before[name][~mask].abs().max() <= before[name][mask].abs().min()


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    "limits", [{"sparsity": 0.8}, {"sparsity": 0.8, "scope": "global"}, {"pattern": "2:4"}], ids=str
)
def test_what_is_removed_does_not_come_back(bert, score, limits):
    prune = PruneWeights(score=score, **limits, **RAMP)
    spy = Spy(prune)
    trained(bert, prune, spy)
    steps = [found for found in spy.masks.values() if found]
    assert len({removed(found) for found in steps}) == 4
    for earlier, later in pairwise(steps):
        assert not any((later[name] & ~earlier[name]).any() for name in later)


def test_what_is_removed_goes_before_zeros_that_are_not(bert):
    class Zeros(L.Callback):
        """Ties: all weights of a layer have the same magnitude."""

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step >= 4:
                module.student.get_parameter(name).detach().zero_()

    name, prune = (
        "bert.encoder.layer.0.output.dense.weight",
        PruneWeights(sparsity=0.5, start=2, end=5, every=1),
    )
    spy, module = Spy(prune), module_of(bert)
    module.student.get_parameter(name).detach()[:8].mul_(
        10
    )  # the first to go are not the first of all
    trained(bert, Zeros(), prune, spy, module=module)
    assert int((~spy.masks[3][name]).sum()) > 100
    assert not (prune.masks[name] & ~spy.masks[3][name]).any()


@pytest.mark.parametrize(
    ("pattern", "score"), [("2:4", "magnitude"), ("3:4", "wanda"), ("1:8", "movement")]
)
def test_n_of_m_is_come_to_by_and_by_and_is_exact_in_every_group(made, score, pattern):
    prune = PruneWeights(pattern=pattern, score=score, **RAMP)
    spy, (kept, group) = Spy(prune), masks.parse_pattern(pattern)
    module = trained(made, prune, spy)
    for weight_OI, mask_OI in weights_of(module, prune).values():
        assert (mask_OI.reshape(-1, group).sum(1) == kept).all()
        assert torch.equal(weight_OI != 0, mask_OI)
    for step, found in spy.masks.items():
        for name, mask in found.items():
            layer = module.student.get_submodule(name.removesuffix(".weight"))
            groups = (mask.T if isinstance(layer, Conv1D) else mask).reshape(-1, group)
            assert (groups.sum(1) >= kept).all()
            assert int((~groups).sum()) == round(
                prune.schedule.at(step, 8) * (1 - kept / group) * mask.numel()
            )


def test_the_global_threshold_takes_more_from_some_layers(bert):
    module = module_of(bert)
    with torch.no_grad():
        for name in select_modules(module.student, ["*layer.0.*query"]):
            module.student.get_parameter(f"{name}.weight").mul_(0.01)
    prune = PruneWeights(sparsity=0.5, scope="global", start=0, shape="one_shot")
    trained(bert, prune, module=module)
    shares = {name: (~mask).float().mean().item() for name, mask in prune.masks.items()}
    assert max(shares, key=shares.get) == "bert.encoder.layer.0.attention.self.query.weight"
    assert max(shares.values()) > 0.95 > 0.5 > min(shares.values())


@pytest.mark.parametrize("share", [1, 3])
def test_wanda_judges_by_the_inputs_since_the_last_mask(bert, share):
    """Computed by hand from the training tokens before each mask, without padding."""
    name, seen, checked = "bert.encoder.layer.1.intermediate.dense", [], []

    def note(part, tensor):
        if part.training:
            seen.append(tensor.detach())

    class ByHand(PruneWeights):
        def prepare(self, module):
            super().prepare(module)
            module.student.get_submodule(name).register_forward_pre_hook(
                lambda layer, inputs: note(layer, inputs[0])
            )
            hook = lambda model, _, words: note(model, words["attention_mask"].bool())  # noqa: E731
            module.student.register_forward_pre_hook(hook, with_kwargs=True)

        def change(self, module, amount):
            weight_OI, before = (
                module.student.get_parameter(f"{name}.weight").detach().clone(),
                self.masks.get(f"{name}.weight"),
            )
            assert len(seen) == 2 * share * 2  # two micro-batches a step
            norm_I = torch.cat(
                [inputs[mask] for mask, inputs in zip(seen[::2], seen[1::2], strict=True)]
            ).norm(dim=0)
            score_OI = weight_OI.abs() * norm_I
            super().change(module, amount)
            mask_OI = self.masks[f"{name}.weight"]
            for row, mask in zip(score_OI, mask_OI, strict=True):
                assert row[~mask].max() <= row[mask].min() * (1 + 1e-5)
            assert before is None or not (mask_OI & ~before).any()
            seen.clear()
            checked.append(amount)

    prune = ByHand(
        sparsity=0.5, score="wanda", scope="row", start=0, end=6, every=share, shape="linear"
    )
    trained(bert, prune, accumulate=2)
    assert len(checked) == 6 // share


def test_movement_keeps_what_training_moved_away_from_zero(bert):
    totals = {}

    class ByHand(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            for name, parameter in module.student.named_parameters():
                totals[name] = totals.get(name, 0) - (parameter * parameter.grad).detach()

    prune = PruneWeights(sparsity=0.5, score="movement", start=1.0, end=1.0)
    trained(bert, ByHand(), prune)
    for name, mask in prune.masks.items():
        assert totals[name][~mask].max() <= totals[name][mask].min()


def test_by_movement_a_weight_comes_back_as_it_left_when_others_fall_below_it(bert):
    name = "bert.encoder.layer.0.output.dense.weight"

    class Fall(L.Callback):
        """Puts the scores of all that the first mask keeps below those of what it removed."""

        def on_train_batch_end(self, trainer, module, *_):  # before the technique
            if trainer.global_step == 4:
                self.before = module.student.get_parameter(name).detach().clone()
            if trainer.global_step == 5:
                self.mask, self.scores = prune.masks[name].clone(), prune.statistics[name].clone()
            if trainer.global_step == 6:
                self.moved = (prune.statistics[name] != self.scores)[~self.mask]
                prune.statistics[name][self.mask] -= 1e3

    class Return(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):  # after the technique
            if trainer.global_step == 6:
                self.weight = module.student.get_parameter(name).detach().clone()

    prune, fall, back = (
        PruneWeights(sparsity=0.5, score="movement", start=2, end=6, every=2),
        Fall(),
        Return(),
    )
    module = trained(bert, fall, prune, back, Spy(prune))
    assert int((~fall.mask).sum()) == round(0.5 * 0.875 * 512)
    assert fall.moved.float().mean() > 0.9
    assert torch.equal(back.weight[~fall.mask], fall.before[~fall.mask])
    assert prune.masks[name][~fall.mask].all()
    assert int((module.student.get_parameter(name) == 0).sum()) == 256


# ---- what it leaves alone


def test_gradients_are_clipped_by_the_norm_of_what_is_kept(bert):
    norms = []

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = {
                name: parameter.grad
                for name, parameter in module.student.named_parameters()
                if parameter.grad is not None
            }
            if gradients:
                assert all(
                    (gradients[name][~mask] == 0).all() for name, mask in prune.masks.items()
                )
                norms.append(
                    torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
                )

    prune = PruneWeights(sparsity=0.9, start=0, shape="one_shot")
    trained(bert, prune, Norms(), module=module_of(bert, clip=1e-3))
    assert len(norms) >= 6
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)


@pytest.mark.parametrize("score", ["magnitude", "movement", "wanda"])
def test_to_remove_nothing_changes_nothing(bert, score):
    alone, watched = trained(bert), trained(bert, PruneWeights(sparsity=0.0, score=score, **RAMP))
    for first, second in zip(alone.student.parameters(), watched.student.parameters(), strict=True):
        assert torch.equal(first, second)


def test_only_the_layers_named_are_pruned_and_the_record_says_which(bert):
    first = PruneWeights(sparsity=0.5, layers=["*layer.1.*query", "*output.dense"], **RAMP)
    second = PruneWeights(pattern="2:4", layers=["classifier"], **RAMP)
    first.name, second.name = "first", "second"
    module = trained(bert, first, second)
    expected = [
        *(
            f"bert.encoder.layer.{layer}.{part}output.dense.weight"
            for layer in range(3)
            for part in ("attention.", "")
        ),
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight",
    ]
    assert CompressionConfig.from_config(module.student.config) == CompressionConfig(
        sparse=sorted(expected)
    )
    zeros = [
        name
        for name, parameter in module.student.named_parameters()
        if parameter.ndim > 1 and (parameter == 0).float().mean() > 0.3
    ]
    assert sorted(zeros) == sorted(expected)


@pytest.mark.parametrize("score", ["magnitude", "movement", "wanda"])
def test_nothing_is_left_of_the_watching_once_the_mask_is_final(bert, score):
    prune = PruneWeights(sparsity=0.5, score=score, **RAMP)
    module = trained(bert, prune)
    assert not any(part._forward_pre_hooks for part in module.student.modules())
    assert prune.statistics == prune.removed_values == {}
    assert prune.rank_synced_state() is prune.masks


# ---- other techniques


class Rebuild(Compression):
    """Replace feed-forward networks by a narrower and by a factorized one."""

    stage = "structure"

    def prepare(self, module):
        pass

    def change(self, module, amount):
        for block in module.student.bert.encoder.layer:
            block.intermediate.dense = nn.Linear(16, 20)
            block.output.dense = LowRank(20, 16, 4)
        module.refresh_optimizer_params()


@pytest.mark.parametrize("score", ["magnitude", "movement", "wanda"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_layers_may_get_another_form_before(bert, score, first):
    rebuild = Rebuild(start=2, end=2, shape="one_shot", every=1)
    prune = PruneWeights(
        sparsity=0.5,
        score=score,
        layers=["*.output.dense", "*.intermediate.dense"],
        start=2,
        end=5,
        every=1,
    )
    trained(bert, *((rebuild, prune) if first else (prune, rebuild)), Spy(prune))
    shapes = {
        name.removeprefix("bert.encoder.layer.0."): tuple(mask.shape)
        for name, mask in prune.masks.items()
        if "layer.0" in name
    }
    assert shapes == {
        "intermediate.dense.weight": (20, 16),
        "attention.output.dense.weight": (16, 16),
        "output.dense.first.weight": (4, 20),
        "output.dense.second.weight": (16, 4),
    }
    assert all(int((~mask).sum()) == mask.numel() // 2 for mask in prune.masks.values())


# ---- resume


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.6},
        {"sparsity": 0.6, "scope": "global", "every": 3},
        {"sparsity": 0.5, "score": "movement"},
        {"sparsity": 0.5, "score": "wanda", "scope": "row", "every": 3},
        {"pattern": "2:4", "score": "wanda"},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_with_the_same_bytes(bert, tmp_path, arguments, step):
    """Resuming between epochs, before the first mask and among the masks gives the same state."""
    schedule = (
        {"start": 5, "end": 11, "every": 1} if step == 4 else {"start": 2, "end": 11, "every": 1}
    )
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    ends = []
    for resume in (None, str(tmp_path / f"step={step}.ckpt")):
        prune, module = PruneWeights(**(schedule | arguments)), module_of(bert, steps=12)
        trained(
            bert,
            prune,
            *([] if resume else [saved]),
            Spy(prune),
            module=module,
            resume=resume,
            validate=False,
        )
        moments = module.trainer.optimizers[0].state_dict()["state"]
        ends.append(
            {
                **module.student.state_dict(),
                **{f"mask of {name}": mask for name, mask in prune.masks.items()},
                **{
                    f"{name} of {index}": value
                    for index, values in moments.items()
                    for name, value in values.items()
                },
            }
        )
        assert CompressionConfig.from_config(module.student.config) == CompressionConfig(
            sparse=sorted(prune.masks)
        )
    whole, resumed = ends
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({}, "sparsity is None and pattern is None"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity is 0.5 and pattern is 2:4"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": "half"}, "sparsity is half"),
        ({"pattern": "4:2"}, "pattern is 4:2"),
        ({"sparsity": 0.5, "score": "luck"}, "score is luck"),
        ({"sparsity": 0.5, "scope": "head"}, "scope is head"),
        ({"sparsity": 0.5, "layers": "*query"}, "layers is *query"),
        ({"sparsity": 0.5, "start": 2.5}, "start is 2.5"),
        ({"sparsity": 0.5, "every": 0}, "every is 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, refused):
    with pytest.raises(UserError) as error:
        PruneWeights(**arguments)
    assert str(error.value).startswith(f"PruneWeights: {refused}, but ")


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({"sparsity": 0.5, "layers": ["*.lin9"]}, "layers has *.lin9"),
        ({"pattern": "2:6"}, "pattern is 2:6"),
        ({"sparsity": 0.5, "end": "9 steps"}, "the schedule ends at step 9"),
        (
            {"sparsity": 0.5, "score": "wanda", "start": 0, "shape": "one_shot"},
            "the first mask is due at step 0",
        ),
        (
            {"sparsity": 0.5, "score": "movement", "start": 0, "end": 0},
            "the first mask is due at step 0",
        ),
    ],
)
def test_what_does_not_fit_the_student_is_refused_before_the_first_step(bert, arguments, refused):
    module = module_of(bert)
    with pytest.raises(UserError) as error:
        trained(bert, PruneWeights(**arguments), module=module)
    assert str(error.value).startswith(f"PruneWeights: {refused}, but ")
    assert module.trainer.global_step == 0


def test_statistics_of_layers_that_will_be_replaced_are_refused(bert):
    rebuild = Rebuild(start=0, end="4 steps", shape="linear", every=1)
    prune = PruneWeights(sparsity=0.5, score="wanda", start="4 steps", shape="one_shot")
    with pytest.raises(UserError, match="the first mask is due at step 4, but wanda needs"):
        trained(bert, rebuild, prune)


def test_an_output_layer_that_is_the_embedding_is_refused(gpt2):
    with pytest.raises(UserError, match="^PruneWeights: layers has lm_head, but "):
        trained(gpt2, PruneWeights(sparsity=0.5, layers=["lm_head"]))
