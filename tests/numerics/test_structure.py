"""Laws of structured pruning: removing equals masking, for every model family."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.compress import importance, structure, widths
from distill.compress.observe import Observer
from distill.compress.restore import restore_structure
from distill.models import blocks
from distill.models.families import stack_of

BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 20,
}
CAUSAL = {"gpt2", "llama", "mistral", "qwen2", "qwen3"}
SIZES = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {
        "dim": 24,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 20,
        "max_position_embeddings": 40,
    },
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40},
    "llama": LLAMA | {"tie_word_embeddings": True},
    "mistral": LLAMA,
    "qwen2": LLAMA
    | {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "qwen3": LLAMA | {"head_dim": 6, "attention_bias": True},
}
KINDS = [(name, kind) for kind in ("neurons", "heads") for name in SIZES]
IDS = torch.arange(3, 45).view(3, 14) % 37
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0


def model(family, attention="eager", seed=0, **changes):
    """A random model whose biases and weights are all far from 0."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=40,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=None,
        **(SIZES[family] | changes),
    )
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSequenceClassification
    made = auto.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return made


@torch.no_grad()
def answers(made):
    return made(input_ids=IDS, attention_mask=MASK).logits


def groups_of(made, kind):
    return [getattr(structure, kind)(made, block) for block in blocks(made)]


def some(found, unequal=True, seed=1):
    """Masks that keep one half of each block's groups, or other shares."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for place, groups in enumerate(found):
        count = max(1, groups.count // 2 + (place - 1 if unequal else 0))
        mask = torch.zeros(groups.count, dtype=torch.bool)
        mask[torch.randperm(groups.count, generator=generator)[:count]] = True
        kept.append(mask)
    return kept


def cut(made, kind, kept, optimizer=None):
    for groups, mask in zip(groups_of(made, kind), kept, strict=True):
        structure.remove_groups(groups, mask, optimizer)
    widths.head_attributes(made, {})


def record(made):
    """The config's account, as the callbacks write it."""
    shapes = widths.update_config(made)
    attributes = widths.head_attributes(made, shapes)
    described = {"shapes": shapes, "attributes": attributes}
    made.config.compression = {key: value for key, value in described.items() if value} or None
    return made


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_what_is_removed_answers_as_what_is_masked(family, kind, attention):
    made = model(family, attention)
    whole, twin, kept = answers(made), copy.deepcopy(made), some(groups_of(made, kind))
    for groups, mask in zip(groups_of(twin, kind), kept, strict=True):
        structure.zero_groups(groups, mask)
    cut(made, kind, kept)
    torch.testing.assert_close(
        answers(made), answers(twin), rtol=0, atol=1e-6 * max(1, float(whole.abs().max()))
    )
    assert (answers(made) - whole).abs().max() > 1e-3
    assert [groups.count for groups in groups_of(made, kind)] == [int(mask.sum()) for mask in kept]
    assert sum(p.numel() for p in made.parameters()) == sum(
        int((p != 0).sum()) for p in twin.parameters()
    )


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_removing_nothing_changes_nothing(family, kind):
    made = model(family)
    before, parameters = answers(made), list(made.parameters())
    cut(
        made, kind, [torch.ones(groups.count, dtype=torch.bool) for groups in groups_of(made, kind)]
    )
    assert widths.update_config(made) == {}
    assert all(one is other for one, other in zip(parameters, made.parameters(), strict=True))
    assert torch.equal(answers(made), before)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_is_that_without(family, attention):
    made = model(family, attention)
    cut(made, "heads", some(groups_of(made, "heads")))
    structure.keep_blocks(made, [0, 2])
    cached, fresh = (
        made.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, fresh)
    assert cached.shape[1] == IDS.shape[1] + 8


def test_query_heads_go_with_the_key_and_value_head_that_they_share():
    made = model("llama")
    cut(made, "heads", some(groups_of(made, "heads")))
    for block in blocks(made):
        attention = block.self_attn
        assert (
            attention.q_proj.out_features
            == 2 * attention.k_proj.out_features
            == attention.o_proj.in_features
        )
        assert attention.k_proj.out_features == attention.v_proj.out_features
        assert attention.num_key_value_groups == 2


def test_tied_embeddings_stay_tied():
    made = model("llama")
    cut(made, "neurons", some(groups_of(made, "neurons")))
    assert made.lm_head.weight is made.model.embed_tokens.weight


# ---- the optimizer


def stepped(made, steps=2, decay=0.1, lr=1e-2):
    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, weight_decay=decay)
    for _ in range(steps):
        step(made, optimizer)
    return optimizer


def step(made, optimizer):
    optimizer.zero_grad()
    made(input_ids=IDS, attention_mask=MASK).logits.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "heads"), ("llama", "heads"), ("gpt2", "neurons"), ("llama", "neurons")],
)
def test_the_moments_of_what_survives_are_slices_of_the_old_ones(family, kind):
    made = model(family)
    optimizer, kept = stepped(made), some(groups_of(made, kind))
    marked = {}
    for groups, mask in zip(groups_of(made, kind), kept, strict=True):
        for part in groups.slices:
            assert part.parameter in optimizer.state
            marked[part.layer, part.name] = (
                part,
                part.indices(mask),
                dict(optimizer.state[part.parameter]),
            )
    cut(made, kind, kept, optimizer)
    for part, places, old in marked.values():
        new = optimizer.state[part.parameter]
        assert torch.equal(new["step"], old["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert new[key].shape == part.parameter.shape
            assert torch.equal(new[key], old[key].index_select(part.dim, places))
    assert len(optimizer.state) == len(list(made.parameters()))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("distilbert", "neurons"), ("bert", "heads"), ("llama", "heads"), ("qwen2", "neurons")],
)
def test_training_after_a_removal_is_training_of_the_masked_twin(family, kind):
    """Same gradients, same moments, hence the same steps."""
    made = model(family)
    optimizer, kept = stepped(made), some(groups_of(made, kind))
    twin = copy.deepcopy(made)
    second = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for groups, mask in zip(groups_of(twin, kind), kept, strict=True):
        structure.zero_groups(groups, mask, second)
    cut(made, kind, kept, optimizer)
    optimizer.param_groups[0]["params"] = list(made.parameters())
    for _ in range(3):
        step(made, optimizer)
        step(twin, second)
    torch.testing.assert_close(answers(made), answers(twin), rtol=0, atol=2e-5)
    for groups, mask in zip(groups_of(twin, kind), kept, strict=True):
        assert all(
            part.parameter.index_select(part.dim, part.indices(~mask)).eq(0).all()
            for part in groups.slices
        )


def test_masking_clears_moments_and_gradients_too():
    made = model("bert")
    optimizer = stepped(made)
    groups, mask = groups_of(made, "heads")[0], torch.tensor([True, False, True])
    structure.zero_groups(groups, mask, optimizer)
    for part in groups.slices:
        moments = optimizer.state[part.parameter]
        for tensor in (
            part.parameter,
            part.parameter.grad,
            moments["exp_avg"],
            moments["exp_avg_sq"],
        ):
            assert tensor.index_select(part.dim, part.indices(~mask)).eq(0).all()
            assert tensor.index_select(part.dim, part.indices(mask)).ne(0).any()


# ---- what the config says


@pytest.mark.parametrize(
    ("family", "kind"),
    [(name, "neurons") for name in SIZES]
    + [(name, "heads") for name in ("llama", "mistral", "qwen2", "qwen3")],
)
def test_equal_widths_load_plainly(family, kind, tmp_path):
    made = model(family)
    cut(made, kind, some(groups_of(made, kind), unequal=False))
    assert widths.update_config(made) == {}
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(answers(loaded.eval()), answers(made))
    assert groups_of(loaded, "neurons")[0].count == groups_of(made, "neurons")[0].count


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_unequal_widths_are_recorded(family, kind):
    made = model(family)
    cut(made, kind, some(groups_of(made, kind)))
    shapes, skeleton = widths.update_config(made), type(made)(made.config)
    built = {
        name: layer.weight.shape
        for name, layer in skeleton.named_modules()
        if isinstance(layer, nn.Linear | structure.Conv1D)
    }
    for name, layer in made.named_modules():
        if name in built:
            assert (name in shapes) == (layer.weight.shape != built[name])
        if name in shapes:
            assert shapes[name] == list(
                layer.weight.shape
                if isinstance(layer, structure.Conv1D)
                else layer.weight.shape[::-1]
            )
    assert shapes


def test_equal_heads_of_bert_are_recorded_since_its_config_cannot_say_them():
    made = model("bert")
    cut(made, "heads", some(groups_of(made, "heads"), unequal=False))
    shapes = widths.update_config(made)
    assert len(shapes) == 3 * 4
    assert made.config.num_attention_heads == 3


def test_numbers_of_heads_that_a_family_s_config_refuses_are_recorded(tmp_path):
    for family, recorded in (
        ("llama", True),
        ("mistral", False),
    ):  # 5 * 2 query heads do not divide 64 features
        made = model(family, hidden_size=64, num_attention_heads=16, num_key_value_heads=8)
        cut(made, "heads", [torch.arange(8) < 5] * 3)
        assert bool(widths.update_config(made)) == recorded
        assert made.config.num_attention_heads == (16 if recorded else 10)
        made.save_pretrained(tmp_path / family)


def test_widths_that_become_equal_leave_the_record():
    made = model("distilbert")
    cut(made, "neurons", [torch.arange(20) < count for count in (10, 12, 14)])
    assert len(widths.update_config(made)) == 6
    cut(made, "neurons", [torch.arange(count) < 10 for count in (10, 12, 14)])
    assert widths.update_config(made) == {}
    assert made.config.hidden_dim == 10


# ---- whole blocks


@pytest.mark.parametrize("family", SIZES)
def test_blocks_that_stay_answer_in_their_order_and_load_plainly(family, tmp_path):
    made = model(family)
    kept = [blocks(made)[place] for place in (0, 2)]
    structure.keep_blocks(made, [0, 2])
    assert [*blocks(made)] == kept
    assert widths.update_config(made) == {}
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, attn_implementation="eager")
    assert len(blocks(loaded)) == 2
    assert torch.equal(answers(loaded.eval()), answers(made))


@pytest.mark.parametrize("kind", ["neurons", "heads", "both"])
@pytest.mark.parametrize("family", SIZES)
def test_a_fresh_student_takes_the_described_form(family, kind):
    made = model(family)
    structure.keep_blocks(made, [1, 2])
    for one in ("neurons", "heads") if kind == "both" else (kind,):
        cut(made, one, some(groups_of(made, one), unequal=False))
    record(made)
    fresh = model(family, seed=5)
    restore_structure(fresh, made.config.to_dict())
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(answers(fresh), answers(made))
    left, right = fresh.config.to_dict(), made.config.to_dict()
    assert {key: left[key] for key in right if key != "compression"} == {
        key: right[key] for key in right if key != "compression"
    }
    assert [name for name, _ in fresh.named_parameters()] == [
        name for name, _ in made.named_parameters()
    ]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_fresh_student_takes_recorded_shapes(family, kind):
    made = model(family)
    cut(made, kind, some(groups_of(made, kind)))
    record(made)
    fresh = model(family, seed=5)
    restore_structure(fresh, made.config.to_dict())
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(answers(fresh), answers(made))
    assert fresh.config.compression == made.config.compression


def test_rebuilding_a_student_of_the_same_form_changes_nothing():
    made = model("bert")
    parameters = list(made.parameters())
    restore_structure(made, made.config.to_dict())
    assert all(one is other for one, other in zip(parameters, made.parameters(), strict=True))


# ---- what matters least


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_magnitude_is_the_norm_of_a_group_s_weights(family, kind):
    made = model(family)
    groups = groups_of(made, kind)[1]
    scores = importance.magnitude(groups)
    for place in range(groups.count):
        alone = torch.arange(groups.count) == place
        weights = [
            part.parameter.index_select(part.dim, part.indices(alone)).flatten()
            for part in groups.slices
            if part.name == "weight"
        ]
        torch.testing.assert_close(scores[place], torch.cat(weights).norm())


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_first_order_is_the_slope_of_the_loss_in_a_gate_on_the_group(family, kind):
    made, width = (
        model(family).double(),
        0.02,
    )  # wide: norms of the Llama families compute in float32
    groups = groups_of(made, kind)[1]
    made(input_ids=IDS).logits.square().mean().backward()
    scores, weight = importance.first_order(groups), groups.output.parameter
    for place in range(0, groups.count, max(1, groups.count // 3)):
        columns, losses = groups.output.indices(torch.arange(groups.count) == place), []
        for gate in (1 + width, 1 - width):
            gated = copy.deepcopy(made)
            with torch.no_grad():
                other = groups_of(gated, kind)[1].output.parameter
                other.copy_(
                    weight.index_copy(
                        groups.output.dim,
                        columns,
                        gate * weight.index_select(groups.output.dim, columns),
                    )
                )
                losses.append(gated(input_ids=IDS).logits.square().mean())
        slope = (losses[0] - losses[1]).abs() / (2 * width)
        torch.testing.assert_close(scores[place].double(), slope, rtol=1e-2, atol=1e-5)


def test_activation_counts_real_tokens_only():
    made = model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    seen = []
    layer = groups_of(made, "neurons")[0].output.layer
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    observer = Observer(made, {"0": layer}, importance.activation_sum)
    made(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(observer.values["0"], (seen[0].abs() * MASK[..., None]).sum((0, 1)))


def test_a_block_that_passes_its_input_through_has_no_influence():
    made = model("gpt2", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train()
    with torch.no_grad():
        for layer in (blocks(made)[1].attn.c_proj, blocks(made)[1].mlp.c_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    observer = importance.BlockInfluence(made)
    made(input_ids=IDS, attention_mask=MASK)
    assert observer.values["1"].abs() < 1e-3
    assert min(observer.values["0"], observer.values["2"]) > 0.1


def test_the_lowest_go_and_what_is_gone_stays_gone():
    scores, kept = (
        torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0]),
        torch.tensor([True, True, True, True, False]),
    )
    assert importance.keep_highest(scores, kept, 0).tolist() == [True] * 5
    assert importance.keep_highest(scores, kept, 1).tolist() == [True, True, True, True, False]
    assert importance.keep_highest(scores, kept, 2).tolist() == [True, False, True, True, False]
    assert importance.keep_highest(scores, kept, 4).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75])
def test_each_block_loses_its_share_and_all_together_theirs(share):
    torch.manual_seed(0)
    scores = [torch.rand(20), 100 * torch.rand(20), torch.rand(40)]
    none_gone = [torch.ones(len(block), dtype=torch.bool) for block in scores]
    each, overall = (
        select(scores, none_gone, share)
        for select in (importance.keep_per_block, importance.keep_globally)
    )
    assert [int((~mask).sum()) for mask in each] == [round(share * len(mask)) for mask in each]
    assert sum(int((~mask).sum()) for mask in overall) == round(share * 80)
    further = importance.keep_globally(scores, overall, min(0.95, share + 0.1))
    assert all(not (now & ~before).any() for now, before in zip(further, overall, strict=True))


def test_one_group_stays_in_a_block_that_matters_little_and_scale_does_not_decide():
    kept = [torch.ones(4, dtype=torch.bool)] * 2
    low = torch.tensor([0.1, 0.2, 0.3, 0.05])
    assert [mask.tolist() for mask in importance.keep_globally([low, 1000 * low], kept, 0.5)] == [
        [False, True, True, False]
    ] * 2
    flat, peaked = torch.tensor([5.0, 5.0, 5.0, 5.1]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert [int(mask.sum()) for mask in importance.keep_globally([flat, peaked], kept, 0.75)] == [
        1,
        1,
    ]


def test_too_much_is_told():
    assert (
        importance.explain_excess(0.5, [4, 4], True)
        == ""
        == importance.explain_excess(0.75, [4, 4], False)
    )
    assert importance.explain_excess(0.9, [4, 4], True) == "all 4 of a block"
    assert importance.explain_excess(0.9, [4, 4], False) == "7 of 8, and 6 leave one to each block"


def test_head_width_is_the_config_s():
    made = [model(name) for name in ("bert", "distilbert", "llama", "qwen2", "qwen3")]
    attentions = [stack_of(each, blocks(each)[0]).attention for each in made]
    assert [attention.head_width for attention in attentions] == [8, 8, 4, 4, 6]
