"""Quantize in training: the final weights are those that were trained, for all families."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.callbacks.factorize import Factorize
from distill.callbacks.prune_weights import PruneWeights
from distill.callbacks.quantize import Quantize
from distill.compress import fake_quant
from distill.compress.quantizer import QuantSpec, quantize_weight
from distill.compress.restore import restore_structure
from distill.errors import RunFailed, UserError
from distill.models import logits
from distill.module import Distillation
from distill.recipe import config
from distill.remote_code import modeling
from distill.remote_code.modeling import CompressionConfig
from distill.remote_code.modeling import dequantize as values
from distill.training import loop
from tests.grids import sampled
from tests.worlds import LANGUAGE, STILL, few, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

DISTILBERT = {
    "teacher": {
        "config": {
            "model_type": "distilbert",
            "dim": 16,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 2,
        }
    }
}
WORLDS = {"bert": {}, "distilbert": DISTILBERT, "gpt2": LANGUAGE}
SETTINGS = {
    "8 bits": {},
    "8 bits, dynamic": {"activations": "dynamic"},
    "8 bits, static": {"activations": "static"},
    "3 bits": {"bits": 3},
    "4 bits, a tensor": {"bits": 4, "group": -1},
    "2 bits, groups": {"bits": 2, "group": 8, "symmetric": True},
    "codebook": {"bits": 3, "method": "codebook", "every": 2},
    "codebook of rows": {"bits": 2, "method": "codebook", "group": 0, "every": 1},
    "nf4": {"bits": 4, "method": "nf4"},
}
EPOCH = 4  # steps


@pytest.fixture(scope="module")
def bert(_module_store):
    return few()


@pytest.fixture(scope="module", params=WORLDS)
def made(request, _module_store):
    return few(**WORLDS[request.param])


def student_of(made, seed=1):
    return made.model("student", seed=seed, **STILL[made.run.teacher.config["model_type"]])


def module_of(made, steps=8, student=None):
    return Distillation(
        made.task,
        student or student_of(made),
        made.model(),
        config.Loss(),
        config.Optimizer(lr=1e-2),
        steps,
    )


def trained(made, *callbacks, module=None, resume=None, **options):
    module = module or module_of(made)
    with loop.silence_lightning():
        trainer(module.steps, *callbacks, limit_val_batches=0, **options).fit(
            module, made.loader(seed=0), made.loader("validation"), ckpt_path=resume
        )
    return module


def answers(made, student):
    batch = next(iter(made.loader("validation")))
    with torch.no_grad():
        return logits(student.eval(), batch.inputs)


def weight_of(student, name):
    """The tensor as (O, I)."""
    weight, module = (
        student.get_parameter(name),
        student.get_submodule(name.removesuffix(".weight")),
    )
    return weight.T if isinstance(module, Conv1D) else weight


# ---- what is trained is what is left


ROWS = sampled(itertools.product(WORLDS, SETTINGS), every=2, rest="slow")


@pytest.mark.parametrize(("made", "name"), ROWS, indirect=["made"])
def test_training_and_folding_and_reloading_answer_with_the_same_bits(made, name):
    technique = Quantize(start=2, **SETTINGS[name])
    module = trained(made, technique)
    student = module.student
    before, described = answers(made, student), CompressionConfig.from_config(student.config)
    keys = student.state_dict().keys()
    latent = {name: student.get_parameter(name).clone() for name in described.weights}
    assert technique.finish(student, made.tokenizer) is made.tokenizer
    assert torch.equal(answers(made, student), before)
    for tensor, spec in described.weights.items():
        folded = weight_of(student, tensor)
        assert torch.equal(values(*quantize_weight(folded, QuantSpec(**spec)), spec), folded)
        assert not torch.equal(latent[tensor], student.get_parameter(tensor))
    plain = student_of(made, seed=5)
    assert keys - student.state_dict().keys() == {
        key for key in keys if key.endswith(("centroids", "input_range"))
    }
    assert student.state_dict().keys() == plain.state_dict().keys()
    modeling.build_compressed_layers(plain, CompressionConfig.from_config(student.config))
    plain.load_state_dict(student.state_dict())
    assert torch.equal(answers(made, plain), before)
    assert {type(layer) for layer in student.modules()} == {
        type(layer) for layer in plain.modules()
    }


def test_all_but_norms_biases_and_the_head_is_quantized(made):
    student = trained(made, Quantize(start=0.0), module=module_of(made, 1)).student
    left = {
        name for name, parameter in student.named_parameters() if parameter.ndim > 1
    } - CompressionConfig.from_config(student.config).weights.keys()
    assert all(name.startswith("classifier") or "token_type" in name for name in left)
    assert isinstance(student.get_input_embeddings(), fake_quant.FakeQuantEmbedding)
    output = student.get_output_embeddings()
    if output is not None:
        assert (
            isinstance(output, fake_quant.FakeQuantLinear)
            and output.weight is student.get_input_embeddings().weight
        )
        assert output.activations is None
    only = trained(made, Quantize(start=0.0, embeddings=False), module=module_of(made, 1)).student
    assert not any(
        isinstance(only.get_submodule(name.removesuffix(".weight")), nn.Embedding)
        for name in CompressionConfig.from_config(only.config).weights
    )


def test_a_step_moves_the_latent_weights_and_nothing_is_replaced(made):
    module = module_of(made, 3)
    held = {name: (each, each.detach().clone()) for name, each in module.student.named_parameters()}
    trained(made, Quantize(bits=4, start=0.0), module=module)
    for name, parameter in module.student.named_parameters():
        assert parameter is held[name][0]
        assert not torch.equal(parameter, held[name][1])
    assert len(module.trainer.optimizers[0].state) == len(held)


def test_gradients_are_those_of_a_plain_model_with_the_quantized_weights(made):
    """The straight-through estimator, for layers, tied tensors and looked-up rows alike."""
    student = student_of(made).eval()
    weights = {
        name: QuantSpec("linear", 4, False, 8).as_dict()
        for name, parameter in student.named_parameters()
        if parameter.ndim > 1
    }
    fake_quant.attach_fake_quant(student, weights)
    folded = copy.deepcopy(student)
    fake_quant.fold_fake_quant(folded)
    gradients = []
    for model in (student, folded):
        logits(model, next(iter(made.loader())).inputs).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["8 bits, dynamic", "codebook", "nf4"])
def test_it_trains_under_bfloat16_autocast(made, name):
    module = trained(
        made,
        Quantize(start=0.0, **SETTINGS[name]),
        module=module_of(made, 4),
        precision="bf16-mixed",
    )
    before = answers(made, module.student)
    assert before.isfinite().all() and all(
        parameter.dtype == torch.float32 for parameter in module.parameters()
    )
    Quantize().finish(module.student, None)
    assert torch.equal(answers(made, module.student), before)


# ---- when


def test_nothing_happens_before_the_start_and_1_is_quantization_after_training(bert):
    plain = trained(bert).student
    after = trained(bert, Quantize(start=1.0)).student
    assert all(
        torch.equal(tensor, after.state_dict()[name]) for name, tensor in plain.state_dict().items()
    )
    assert CompressionConfig.from_config(after.config).weights and not torch.equal(
        answers(bert, plain), answers(bert, after)
    )
    early = trained(bert, Quantize(start=0.5)).student
    assert not all(
        torch.equal(tensor, early.state_dict()[name]) for name, tensor in plain.state_dict().items()
    )


def test_codebooks_follow_the_weights_at_every_so_many_steps(bert):
    class Look(L.Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, module, *_):
            self.seen[trainer.global_step] = {
                name: layer.centroids.clone()
                for name, layer in fake_quant.fake_quant_layers(module.student)
            }

    look = Look()
    trained(bert, Quantize(bits=3, method="codebook", start=2, every=3), look)
    assert look.seen[1] == {}
    for name in look.seen[2]:
        same = [
            torch.equal(look.seen[step][name], look.seen[step + 1][name]) for step in range(2, 8)
        ]
        assert same == [True, True, False, True, True, False]


def test_ranges_are_what_the_inputs_of_training_span(bert):
    seen = {}

    class Look(L.Callback):
        def on_fit_start(self, trainer, module):
            layer = module.student.bert.encoder.layer[0].intermediate.dense
            layer.register_forward_pre_hook(
                lambda module, inputs: seen.setdefault("inputs", []).append(inputs[0].detach())
            )

    student = trained(bert, Look(), Quantize(activations="static", start=1.0)).student
    low, high = dict(fake_quant.fake_quant_layers(student))[
        "bert.encoder.layer.0.intermediate.dense"
    ].input_range.tolist()
    assert (
        min(float(each.min()) for each in seen["inputs"])
        <= low
        < 0
        < high
        <= max(float(each.max()) for each in seen["inputs"])
    )
    fake_quant.fold_fake_quant(student)
    assert CompressionConfig.from_config(student.config).activations[
        "bert.encoder.layer.0.intermediate.dense"
    ] == [low, high]


RESUMED = [(family, 2, name) for family in ("bert", "gpt2") for name in SETTINGS] + [
    ("distilbert", 6, "8 bits, static")
]
RESUMED = sampled(RESUMED, every=2, rest="slow")


@pytest.mark.parametrize(("made", "start", "name"), RESUMED, indirect=["made"])
def test_a_run_stopped_at_the_end_of_an_epoch_goes_on_with_the_same_bytes(
    made, tmp_path, name, start
):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=EPOCH, save_top_k=-1)
    whole = trained(made, Quantize(start=start, **SETTINGS[name]), kept)
    resumed = trained(
        made, Quantize(start=start, **SETTINGS[name]), resume=tmp_path / f"step={EPOCH}.ckpt"
    )
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for module in (whole, resumed):
        fake_quant.fold_fake_quant(module.student)
    assert CompressionConfig.from_config(whole.student.config) == CompressionConfig.from_config(
        resumed.student.config
    )
    assert torch.equal(answers(made, whole.student), answers(made, resumed.student))


def test_a_described_student_is_rebuilt_for_its_weights(made):
    student = trained(
        made, Quantize(bits=3, method="codebook", activations="static", start=2)
    ).student
    again = student_of(made, seed=7)
    restore_structure(again, student.config.to_dict())
    again.load_state_dict(student.state_dict())
    assert torch.equal(answers(made, again), answers(made, student))


# ---- with others


PRUNED = itertools.product(WORLDS, ["8 bits", "3 bits", "codebook", "nf4"])


@pytest.mark.parametrize(("made", "name"), sampled(PRUNED, every=3, rest="slow"), indirect=["made"])
def test_pruned_weights_stay_zero(made, name):
    prune = PruneWeights(sparsity=0.5, start=0.2, end=0.6, every=1)
    quantize = Quantize(start=2, **SETTINGS[name])
    module = trained(made, prune, quantize)
    before, masks = answers(made, module.student), prune.masks
    for technique in (prune, quantize):
        technique.finish(module.student, made.tokenizer)
    assert torch.equal(answers(made, module.student), before)
    described = CompressionConfig.from_config(module.student.config)
    for tensor in described.sparse:
        assert (module.student.get_parameter(tensor)[~masks[tensor]] == 0).all()
        folded = weight_of(module.student, tensor)
        qweight, parameters = quantize_weight(
            folded, QuantSpec(**described.weights[tensor]), sparse=True
        )
        assert torch.equal(
            values(qweight, parameters, described.weights[tensor])[folded != 0], folded[folded != 0]
        )


def test_factors_are_quantized_in_place_of_their_layer(bert):
    factorize = Factorize(rank=4, start=2, layers=["*intermediate.dense"])
    quantize = Quantize(
        bits=4,
        group=8,
        activations="static",
        layers=["*intermediate.dense", "*word_embeddings"],
        start=2,
    )
    module = trained(bert, factorize, quantize)
    names = {name for name, _ in fake_quant.fake_quant_layers(module.student)}
    blocks = [f"bert.encoder.layer.{block}.intermediate.dense" for block in range(3)]
    assert names == {
        "bert.embeddings.word_embeddings",
        *(f"{name}.{part}" for name in blocks for part in ("first", "second")),
    }
    assert (
        CompressionConfig.from_config(module.student.config).weights[f"{blocks[0]}.second.weight"][
            "group"
        ]
        == 4
    )  # its width is the rank
    fake_quant.fold_fake_quant(
        module.student
    )  # the ranges of the new layers' inputs are those of the first step since
    ranges = list(CompressionConfig.from_config(module.student.config).activations.values())
    assert len(ranges) == 6 and all(low < high for low, high in ranges)


def test_a_layer_that_no_step_has_reached_since_is_no_result(bert):
    quantize = Quantize(activations="static", layers=["*intermediate.dense"], start=1.0)
    module = trained(bert, Factorize(rank=4, start=1.0, layers=["*intermediate.dense"]), quantize)
    with pytest.raises(RunFailed, match="^the input range of .* is unknown, but"):
        fake_quant.fold_fake_quant(module.student)


def test_two_share_the_student_but_no_tensor(bert):
    linear = {"bits": 8, "embeddings": False, "start": 2}
    both = Quantize(**linear), Quantize(bits=4, layers=["*word_embeddings"], start=2)
    for name, callback in zip("ab", both, strict=True):
        callback.name = name
    student = trained(bert, *both).student
    bits = {
        name: spec["bits"]
        for name, spec in CompressionConfig.from_config(student.config).weights.items()
    }
    assert bits.pop("bert.embeddings.word_embeddings.weight") == 4 and set(bits.values()) == {8}
    before = answers(bert, student)
    for callback in both:
        callback.finish(student, None)
    assert torch.equal(answers(bert, student), before)
    twice = Quantize(start=2), Quantize(bits=4, layers=["*word_embeddings"], start=2)
    for name, callback in zip("ab", twice, strict=True):
        callback.name = name
    with pytest.raises(
        UserError,
        match=r"layers has bert.embeddings.word_embeddings.weight, but another Quantize has it too",
    ):
        trained(bert, *twice)


# ---- bad input


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 1}, "Quantize: bits is 1"),
        ({"bits": 9}, "bits is 9"),
        ({"method": "nf4"}, "nf4 has 4"),
        ({"method": "nf4", "bits": 4, "group": 0}, "nf4 needs"),
        ({"method": "codebook", "symmetric": True}, "symmetric is True"),
        ({"activations": "int8"}, "activations is int8"),
        ({"layers": "*"}, r"layers is \*, but it must be a list"),
        ({"start": 1.5}, "start is 1.5"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(wrong, words):
    with pytest.raises(UserError, match=words):
        Quantize(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"layers": ["*nowhere"]},
            r"layers has \*nowhere, but .* name some of bert",
        ),
        ({"bits": 4, "group": 5}, "group is 5, but it must divide the 16 inputs of"),
        ({"layers": ["*word_embeddings"], "activations": "dynamic"}, "activations is dynamic, but"),
        ({"start": "9 steps"}, "ends at step 9, but the training has 8"),
    ],
)
def test_what_does_not_fit_the_student_is_refused_before_training(bert, wrong, words):
    with pytest.raises(UserError, match=words):
        trained(bert, Quantize(**wrong))


def test_layers_of_other_classes_are_refused(bert):
    class Odd(nn.Linear):
        def forward(self, states):
            return super().forward(states) + 1

    student = student_of(bert)
    student.bert.pooler.dense.__class__ = Odd
    with pytest.raises(UserError, match="belongs to a Odd"):
        fake_quant.attach_fake_quant(student, {"bert.pooler.dense.weight": QuantSpec().as_dict()})
