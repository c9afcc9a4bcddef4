"""Laws of the quantizers: linear with 2 to 8 bits, codebooks, NF4, and quantized inputs."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from distill.compress import codebook
from distill.compress.quantizer import (
    QuantSpec,
    fake_quantize_weight,
    quantize_weight,
    scale_and_zero_point,
)
from distill.errors import UserError
from distill.remote_code import modeling
from distill.remote_code.modeling import dequantize as values
from distill.remote_code.modeling import fake_quantize

BITS = range(2, 9)
SHAPES = [(1, 1), (5, 1), (3, 8), (7, 24), (64, 48)]
LINEAR = [
    QuantSpec("linear", bits, symmetric, group)
    for bits in BITS
    for symmetric in (True, False)
    for group in (-1, 0, 8, 1)
]
CODEBOOKS = [QuantSpec("codebook", bits, False, group) for bits in BITS for group in (-1, 0, 8)]
NF4S = [QuantSpec("nf4", 4, False, group) for group in (1, 8, 24)]


def weights(rows, columns):
    """Ordinary weights and those that break quantizers, by name."""
    torch.manual_seed(rows * 100 + columns)
    spread = torch.randn(rows, columns)
    outlier = spread * 0.02
    outlier[0, 0] = 100
    return {
        "gaussian": spread,
        "positive": spread.abs() + 0.1,
        "negative": -spread.abs() - 0.1,
        "shifted": spread + 3 * torch.randn(rows, 1),
        "few steps": torch.randn(rows, columns).mul(3).round() / 7,
        "all sizes": spread * torch.logspace(-8, 1, rows)[:, None],
        "tiny": spread * 1e-7,
        "zeros": torch.zeros(rows, columns),
        "constant": torch.full((rows, columns), 0.37),
        "outlier": outlier,
        "half zeros": spread * (torch.rand(rows, columns) > 0.5),
        "huge": spread * 1e7,
    }


def cases(specs):
    for shape in SHAPES:
        for name, weight in weights(*shape).items():
            for spec in specs:
                if spec.group < 1 or shape[1] % spec.group == 0:
                    yield f"{name} {shape} {spec}", weight, spec


def same_bytes(first, second):
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))


@pytest.mark.parametrize(
    "specs",
    [LINEAR, CODEBOOKS[:9:4], CODEBOOKS[-3:-2], NF4S],  # 2 to 4 bits with each kind of group
    ids=["linear", "codebook", "codebook of 8 bits", "nf4"],
)
def test_quantizing_again_changes_nothing_and_the_codes_say_it_all(specs):
    for case, weight, spec in cases(specs):
        value = fake_quantize_weight(weight, spec)
        assert same_bytes(fake_quantize_weight(value, spec), value), case
        for given in (weight, value):
            qweight, parameters = quantize_weight(given, spec)
            assert (
                qweight.dtype == torch.uint8
                and qweight.shape == weight.shape
                and int(qweight.max()) < 2**spec.bits
            ), case
            assert same_bytes(values(qweight, parameters, spec.as_dict()), value), case


def test_groups_meet_the_law_of_idempotence_however_they_fall_on_the_grid():
    torch.manual_seed(0)
    for bits in BITS:
        spec = QuantSpec("linear", bits, False, 0)
        for weight in (
            torch.randn(20_000, 6) + torch.randn(20_000, 1),
            torch.randn(20_000, 3) * torch.logspace(-7, 0, 20_000)[:, None],
        ):
            value = fake_quantize_weight(weight, spec)
            assert same_bytes(fake_quantize_weight(value, spec), value)


def test_the_error_is_at_most_half_a_step_and_order_is_kept():
    for case, weight, spec in cases(LINEAR):
        if "huge" in case and spec.bits < 8:
            continue  # beyond float16: clipped
        value, (scale, _) = (
            fake_quantize_weight(weight, spec),
            scale_and_zero_point(spec.grouped(weight), spec),
        )
        group, error = spec.grouped(weight), spec.grouped(value - weight).abs()
        if "huge" not in case:
            assert (error <= scale * 0.5 * (1 + 1e-4)).all(), case
        order = group.argsort(1)
        assert (spec.grouped(value).gather(1, order).diff() >= 0).all(), case
        assert (value[weight == 0] == 0).all(), case


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_values_of_a_grid_are_exact(bits, symmetric):
    spec = QuantSpec("linear", bits, symmetric, 0)
    for zero in {2 ** (bits - 1) - 1} if symmetric else {0, 1, 2 ** (bits - 1), 2**bits - 1}:
        for scale in torch.tensor([1.0, 0.0123, 0.7, 3e-3]).half().float():
            weight = ((torch.arange(spec.quant_max + 1) - zero) * scale)[None]
            assert torch.equal(fake_quantize_weight(weight, spec), weight)


def test_scales_are_the_next_float16_above():
    for symmetric in (True, False):
        for weight in weights(7, 24).values():
            spec = QuantSpec("linear", 4, symmetric, 0)
            scale, zero = scale_and_zero_point(weight, spec)
            assert torch.equal(scale.half().float(), scale) and (scale > 0).all()
            assert (
                torch.equal(zero.round(), zero)
                and (zero >= 0).all()
                and (zero <= spec.quant_max).all()
            )


def test_the_gradient_is_straight_through_inside_the_range_and_zero_outside():
    x = torch.tensor([-10.0, -1.1, -0.9, 0.0, 0.4, 1.4, 1.6, 10.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.5), torch.tensor(2.0), 0, 5)
    assert y.tolist() == [-1.0, -1.0, -1.0, 0.0, 0.5, 1.5, 1.5, 1.5]
    y.backward(torch.arange(1.0, 9.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]


@pytest.mark.parametrize("group", [-1, 0, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_codebook_is_never_worse_than_the_linear_grid(bits, group):
    torch.manual_seed(bits)
    for weight in (
        torch.randn(96, 192),
        torch.rand(96, 192),
        torch.randn(96, 192) ** 3,
        weights(96, 192)["outlier"],
    ):
        spec = QuantSpec("codebook", bits, False, group)
        own, affine, centred = (
            spec.grouped(fake_quantize_weight(weight, each) - weight).square().sum(1)
            for each in (
                spec,
                QuantSpec("linear", bits, False, group),
                QuantSpec("linear", bits, True, group),
            )
        )
        assert (own <= affine * 1.0001).all()
        assert own.sum() < affine.sum() and own.sum() < centred.sum()


def test_more_iterations_of_the_codebook_never_hurt():
    torch.manual_seed(0)
    weight = torch.randn(4, 1000)
    ordered = codebook.SortedWeights.of(weight, sparse=False)
    centroids, last = ordered.linear(16), torch.inf
    for _ in range(5):
        error = (codebook.nearest_centroid(weight, centroids.float()) - weight).square().sum()
        assert error < last
        torch.testing.assert_close(
            ordered.error(centroids).sum() + weight.double().square().sum(),
            error.double(),
            rtol=1e-4,
            atol=0,
        )
        centroids, last = codebook.lloyd(ordered, centroids, 1), error


def test_the_zeros_of_a_sparse_tensor_stay_and_take_no_part_in_its_codebook():
    torch.manual_seed(0)
    weight = torch.randn(8, 96)
    weight[torch.rand(8, 96) < 0.5] = 0
    for group in (-1, 0, 32):
        spec = QuantSpec("codebook", 2, False, group)
        value = fake_quantize_weight(weight, spec, sparse=True)
        assert torch.equal(value == 0, weight == 0)
        assert same_bytes(fake_quantize_weight(value, spec, sparse=True), value)
        qweight, parameters = quantize_weight(weight, spec, sparse=True)
        assert torch.equal(
            values(qweight, parameters, spec.as_dict())[weight != 0], value[weight != 0]
        )
    kept = weight[weight != 0][None]
    alone = fake_quantize_weight(kept, QuantSpec("codebook", 2, False, -1))
    assert torch.equal(
        fake_quantize_weight(weight, QuantSpec("codebook", 2, False, -1), sparse=True)[weight != 0],
        alone[0],
    )


def test_nf4_levels_are_the_quantiles_of_a_normal_distribution():
    from torchao.quantization import to_nf4

    offset = (
        1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)
    ) / 2  # QLoRA: halfway between the outermost quantiles of 15 and of 16 levels
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values / above.max()
    torch.testing.assert_close(
        torch.tensor(modeling.NF4, dtype=torch.float64), levels, rtol=0, atol=1e-6
    )
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    torch.testing.assert_close(
        to_nf4(weight, 64, 64).nf4, torch.tensor(modeling.NF4), rtol=0, atol=1e-4
    )  # it writes four digits


def test_nf4_is_better_than_a_linear_grid_on_gaussian_blocks():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    errors = [
        (fake_quantize_weight(weight, QuantSpec(method, 4, symmetric, 64)) - weight).square().mean()
        for method, symmetric in (("nf4", False), ("linear", True))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("group", [-1, 0, 8])
@pytest.mark.parametrize("method", ["linear", "codebook"])
def test_some_rows_of_a_table_come_out_as_in_the_whole(method, group):
    for bits, symmetric in ((8, True), (3, False)):
        weight, spec = weights(64, 48)["gaussian"], QuantSpec(method, bits, symmetric, group)
        centroids = (
            codebook.fit_centroids(spec.grouped(weight), bits) if method == "codebook" else None
        )
        rows = torch.tensor([5, 0, 63, 5])
        own = (
            centroids
            if centroids is None or len(centroids) == 1
            else centroids.view(64, -1, 2**bits)[rows].flatten(0, 1)
        )
        some = fake_quantize_weight(weight[rows], spec, False, own, table_OI=weight)
        assert same_bytes(some, fake_quantize_weight(weight, spec, False, centroids)[rows])


@pytest.mark.parametrize(
    "spec", [LINEAR[0], LINEAR[5], CODEBOOKS[0], CODEBOOKS[1], NF4S[1]], ids=str
)
def test_weights_that_are_not_finite_are_no_crash(spec):
    for poison in (torch.nan, torch.inf, -torch.inf):
        weight = torch.randn(4, 16)
        weight[1, 3] = poison
        value = fake_quantize_weight(weight, spec)
        assert value.shape == weight.shape
        values(*quantize_weight(weight, spec), spec.as_dict())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.5}, "bits is 2.5"),
        ({"method": "cubic"}, "method is cubic"),
        ({"group": -2}, "group is -2"),
        ({"method": "nf4", "bits": 8, "group": 64}, "nf4 has 4"),
        ({"method": "nf4", "bits": 4, "group": 0}, "nf4 needs"),
    ],
)
def test_what_no_quantizer_can_do_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        replace(QuantSpec(), **wrong)


def test_a_group_must_divide_the_width():
    with pytest.raises(
        UserError, match=r"group is 7, but it must divide the 24 inputs of here: 6 does"
    ):
        QuantSpec("linear", 4, False, 7).check("here", 24)


# ---- quantized inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_rounded_per_token_are_those_of_torchao_bit_for_bit(dtype):
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        _apply_int8_act_asym_per_token_quant_dequant,
    )

    for name, x in weights(64, 48).items():
        x = x.to(dtype)
        assert torch.equal(
            modeling.fake_quantize_per_token(x), _apply_int8_act_asym_per_token_quant_dequant(x)
        ), name
        assert torch.equal(
            modeling.fake_quantize_per_token(x.view(4, 16, 48)).view(64, 48),
            modeling.fake_quantize_per_token(x),
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_on_rounded_inputs_answers_as_torchao_bit_for_bit(dtype):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(48, 24)).to(dtype)
    quantize_(theirs, Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)))
    ours = nn.Linear(48, 24).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(theirs[0].weight.dequantize())
        ours.bias.copy_(theirs[0].bias)
    modeling.quantize_input(ours, None)
    x = torch.randn(3, 7, 48).to(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_inputs_rounded_to_a_range_are_on_its_grid_with_a_gradient_inside_only():
    x = torch.linspace(-2, 3, 1001, requires_grad=True)
    y = modeling.fake_quantize_to_range(x, torch.tensor([-1.0, 1.55]))
    inside = (x > -1) & (x < 1.55)
    assert ((y - x)[inside].abs() <= 0.005 * 1.001).all()
    assert (
        y.min() == -1
        and y.max().item() == pytest.approx(1.55)
        and len(y.unique()) == 256
        and 0 in y
    )
    y.sum().backward()
    assert (x.grad[inside] == 1).all() and (x.grad[(x < -1.006) | (x > 1.556)] == 0).all()
    half = modeling.fake_quantize_to_range(x.detach().bfloat16(), torch.tensor([-1.0, 1.55]))
    assert half.dtype == torch.bfloat16
    assert torch.equal(
        modeling.fake_quantize_to_range(torch.zeros(3), torch.tensor([0.5, 1.0])), torch.zeros(3)
    )


# ---- the shapes that a config cannot say


def test_a_described_model_takes_the_weights_it_was_described_from():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    name = "model.layers.1."
    described = {
        "shapes": {
            f"{name}self_attn.q_proj": [16, 8],
            f"{name}self_attn.o_proj": [8, 16],
            f"{name}mlp.up_proj": [16, 24],
        },
        "low_rank": {f"{name}mlp.down_proj": 3},
        "activations": {
            f"{name}mlp.down_proj.first": {"bits": 8, "range": [-1.0, 2.0]},
            f"{name}mlp.up_proj": {"bits": 8, "range": None},
        },
    }
    modeling.build_compressed_layers(llama, modeling.CompressionConfig.from_json(described))
    first, second = (layer.self_attn.num_key_value_groups for layer in llama.model.layers)
    assert (first, second) == (2, 1)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_()
    assert llama(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    factors = llama.get_submodule(f"{name}mlp.down_proj")
    assert isinstance(factors, modeling.LowRank) and factors.second.bias is None
    assert isinstance(
        factors.first, modeling.ActivationQuantLinear
    ) and factors.first.input_range == [-1.0, 2.0]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    shapes = {"transformer.h.0.mlp.c_fc": [16, 5], "transformer.h.0.mlp.c_proj": [5, 16]}
    modeling.build_compressed_layers(gpt2, modeling.CompressionConfig(shapes=shapes))
    assert (
        gpt2.transformer.h[0].mlp.c_fc.weight.shape == (16, 5)
        and gpt2.transformer.h[0].mlp.c_proj.nf == 16
    )
    assert gpt2.transformer.h[0].mlp.c_fc.bias.shape == (5,)


def test_grids_of_groups_are_those_of_the_groups_alone():
    weight = weights(64, 48)["gaussian"]
    for symmetric in (True, False):
        whole = fake_quantize_weight(weight, QuantSpec("linear", 4, symmetric, 8))
        parts = [
            fake_quantize_weight(weight[:, start : start + 8], QuantSpec("linear", 4, symmetric, 0))
            for start in range(0, 48, 8)
        ]
        assert torch.equal(whole, torch.cat(parts, 1))
        wider = pad(weight, (0, 8))
        assert torch.equal(
            fake_quantize_weight(wider, QuantSpec("linear", 4, symmetric, 8))[:, :48], whole
        )
