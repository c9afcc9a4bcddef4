"""Adapters of peft: merged, switched off, in checkpoints, and what is refused."""

import copy
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill import data, losses, models, prepare, student, teacher, teacher_outputs, training
from distill.errors import UserError
from distill.models import adapters, frozen_weights
from distill.recipe import compose, config
from distill.training import build_callbacks, check_memory, performance, throughput
from distill.training.loggers import Tracker
from tests import processes
from tests.worlds import LANGUAGE, LLAMA, callbacks_of, few, tiny

peft = pytest.importorskip("peft")
BERT = {"teacher": {"outputs": "online"}}


@pytest.fixture(scope="module")
def worlds(_module_store):
    return {
        name: few(**changes)
        for name, changes in {"llama": LLAMA, "gpt2": LANGUAGE, "bert": BERT}.items()
    }


def adapted(made, seed=0, **settings):
    """A random student whose adapter has random values, and a copy without one."""
    plain = made.model("student")
    model = copy.deepcopy(plain)
    adapters.attach(model, config.Lora(**({"rank": 4} | settings)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model, plain


def logits_of(model, made):
    (batch, *_) = made.loader("validation")
    with torch.no_grad():
        return models.logits(model.eval(), batch.inputs)


@pytest.mark.parametrize(
    ("name", "quantize"),
    [("llama", None), ("gpt2", None), ("bert", None), ("llama", "nf4"), ("bert", "nf4")],
)
def test_merged_weights_compute_what_the_adapter_does(worlds, name, quantize):
    if quantize:
        pytest.importorskip("torchao")
    made = worlds[name]
    model, plain = adapted(made, quantize=quantize)
    names = [each for each, _ in plain.named_parameters()]
    before = logits_of(model, made)
    assert not torch.allclose(before, logits_of(plain, made), atol=0.1)
    adapters.merge(model)
    assert [each for each, _ in model.named_parameters()] == names
    assert all(each.requires_grad and each.dtype == torch.float32 for each in model.parameters())
    assert torch.allclose(before, logits_of(model, made), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_its_adapter_a_student_is_exactly_its_base(worlds, name):
    model, plain = adapted(worlds[name], dropout=0.5)
    expected = logits_of(plain, worlds[name])
    with adapters.without_adapter(model):
        assert torch.equal(logits_of(model, worlds[name]), expected)
    assert not torch.equal(logits_of(model, worlds[name]), expected)


def test_an_adapter_is_trained_beside_each_linear_layer_of_the_blocks_and_nothing_else(worlds):
    model, plain = adapted(worlds["llama"])
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert all(".lora_" in name for name in trained)
    in_blocks = [
        each
        for block in models.blocks(plain)
        for each in block.modules()
        if type(each) is nn.Linear
    ]
    ranks = sum(4 * (each.in_features + each.out_features) for each in in_blocks)
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == ranks
    some, _ = adapted(worlds["llama"], targets=["*.q_proj"])
    names = [name for name, each in some.named_parameters() if each.requires_grad]
    assert names
    assert all(".q_proj.lora_" in name for name in names)


def test_a_classification_head_is_trained_too(worlds):
    model, _ = adapted(worlds["bert"])
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {"classifier.weight", "bert.pooler.dense.bias"} <= trained
    assert not any("embeddings" in name or "base_layer" in name for name in trained)


def test_the_head_of_a_classifier_that_is_its_own_teacher_stays_as_it_is(worlds):
    made = worlds["bert"]
    model = made.model()
    adapters.attach(model, config.Lora(rank=4), is_teacher=True)
    with adapters.without_adapter(model):
        before = logits_of(model, made)
    trained = [each for each in model.parameters() if each.requires_grad]
    with torch.no_grad():
        for each in trained:
            each += 1
    assert not torch.equal(logits_of(model, made), before)
    with adapters.without_adapter(model):
        assert torch.equal(logits_of(model, made), before)


def test_weights_of_4_bits_take_about_half_a_byte_each(worlds):
    pytest.importorskip("torchao")
    layer = nn.Linear(256, 512, bias=False)
    plain = copy.deepcopy(layer)
    frozen_weights.quantize_nf4(layer)
    size = frozen_weights.weight_memory(layer)
    assert 0.5 < size / plain.weight.numel() < 0.6
    assert frozen_weights.weight_memory(plain) == 4 * plain.weight.numel()
    frozen_weights.dequantize(layer)
    error = (layer.weight - plain.weight).norm() / plain.weight.norm()
    assert 0.01 < error < 0.15


def test_weights_that_bfloat16_holds_are_stored_in_it_and_autocast_computes_the_same(worlds):
    made = worlds["llama"]
    plain = made.model("student").bfloat16().float()
    low = copy.deepcopy(plain)
    for model, is_low in ((plain, False), (low, True)):
        torch.manual_seed(0)
        adapters.attach(model, config.Lora(rank=4), is_low)
    assert frozen_weights.weight_memory(low) < frozen_weights.weight_memory(plain)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(logits_of(low, made), logits_of(plain, made))
    gradients = {}
    for name, model in (("plain", plain), ("low", low)):
        with torch.autocast("cpu", torch.bfloat16):
            models.logits(model, next(iter(made.loader())).inputs).square().mean().backward()
        trained = [each for each in model.parameters() if each.requires_grad]
        gradients[name] = torch.cat([each.grad.flatten() for each in trained])
    assert torch.equal(gradients["low"], gradients["plain"])
    inexact = nn.Linear(4, 4)
    frozen_weights.store_in_bfloat16(inexact)
    assert inexact.weight.dtype == torch.float32
    adapters.merge(plain)
    adapters.merge(low)
    assert models.fingerprint(low) == models.fingerprint(plain)


# ---- training


@pytest.fixture(scope="module")
def base(worlds, tmp_path_factory):
    """The folder of a model, which is both teacher and student."""
    folder = tmp_path_factory.mktemp("base")
    models.save(worlds["llama"].model(), worlds["llama"].tokenizer, folder)
    return str(folder)


def run_of(base, outputs="online", **lora):
    section = {"config": None, "model": base, "outputs": outputs}
    if outputs == "base":
        section["dtype"] = "auto"
    changes = LLAMA | {
        "teacher": LLAMA["teacher"] | section,
        "tokenizer": {"vocab_size": None},
        "student": {"layers": None, "model": base, "lora": {"rank": 4} | lora},
        "trainer": {"checkpoint": {"steps": 2}},
    }
    return tiny(**changes)


@pytest.fixture(scope="module")
def prepared(base, _module_store):
    return few_examples(prepare.prepare_run(run_of(base)))


def few_examples(made):
    made.examples["train"] = made.examples["train"].select(range(64))
    made.examples["validation"] = made.examples["validation"].select(range(16))
    return made


def train(run, made, folder, *callbacks):
    """The student of a run folder after the student stage."""
    tracker = Tracker(run, folder)
    model = teacher.obtain(run, made, folder, tracker)
    student.train_student(run, made, model, [*callbacks_of(run, made), *callbacks], folder, tracker)
    return models.load(str(folder / "student"), None, made.task, "student", made.tokenizer)


class Stop(Exception):
    pass


def stop_at(step):
    from lightning.pytorch.callbacks import Callback

    class Stopping(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == step:
                raise Stop

    return Stopping()


DROPOUT = {"dropout": 0.2}


@pytest.fixture(scope="module")
def finished(base, prepared, tmp_path_factory):
    """The folder of a training that nothing interrupted, and its student."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(run_of(base, **DROPOUT), prepared, folder)


def test_a_resumed_training_ends_with_the_same_bytes(base, prepared, finished, tmp_path):
    with pytest.raises(Stop):
        train(run_of(base, **DROPOUT), prepared, tmp_path, stop_at(5))
    resumed = train(run_of(base, **DROPOUT), prepared, tmp_path)
    assert models.fingerprint(resumed) == models.fingerprint(finished[1])


@pytest.mark.slow
def test_a_resumed_training_beside_weights_of_4_bits_does_too(base, prepared, tmp_path):
    pytest.importorskip("torchao")
    run = run_of(base, quantize="nf4")
    whole = train(run, prepared, tmp_path / "whole")
    with pytest.raises(Stop):
        train(run, prepared, tmp_path / "resumed", stop_at(5))
    resumed = train(run, prepared, tmp_path / "resumed")
    assert models.fingerprint(resumed) == models.fingerprint(whole)


def interrupted_and_whole(folder):
    """Fingerprints of a student that was resumed on this rank, and of one that was not."""
    base, outputs, strategy, quantize = (folder / "settings").read_text().split()
    run = run_of(base, outputs, quantize=None if quantize == "-" else quantize)
    run = replace(run, trainer=replace(run.trainer, strategy=strategy, devices=2))
    made = few_examples(prepare.prepare_run(run))
    with suppress(Stop):
        train(run, made, folder / "resumed", stop_at(5))
    ends = [train(run, made, folder / name) for name in ("resumed", "whole")]
    return [models.fingerprint(end) for end in ends]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param("online ddp nf4", marks=pytest.mark.slow),
        pytest.param("base ddp -", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("base fsdp -", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_a_resumed_training_on_two_ranks_ends_with_the_same_bytes(base, tmp_path, settings):
    pytest.importorskip("torchao")
    (tmp_path / "settings").write_text(f"{base} {settings}")
    ends = processes.on_ranks(interrupted_and_whole, tmp_path, 2)
    assert len({end for rank in ends for end in rank}) == 1


def test_a_checkpoint_holds_only_what_is_trained(finished):
    saved = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    assert len(saved["state_dict"]) == 2 * 7 * 3  # two matrices, seven layers, three blocks


def test_other_frozen_weights_are_not_continued(base, prepared, tmp_path):
    run = run_of(base)
    with pytest.raises(Stop):
        train(run, prepared, tmp_path / "run", stop_at(3))
    other = models.load(base, None, prepared.task, "student", prepared.tokenizer)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    models.save(other, prepared.tokenizer, tmp_path / "other")
    run = replace(run, student=replace(run.student, model=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"student\.lora"):
        train(run, prepared, tmp_path / "run")


def test_the_base_teaches_as_a_copy_of_it_in_memory_does(base, prepared, finished, tmp_path):
    shared = train(run_of(base, "base", **DROPOUT), prepared, tmp_path)
    assert models.fingerprint(shared) == models.fingerprint(finished[1])
    plain = models.load(base, None, prepared.task, "teacher", prepared.tokenizer)
    assert models.fingerprint(shared) != models.fingerprint(plain)


def test_the_base_takes_no_memory(base, prepared):
    run = run_of(base, "base")
    model = models.load(base, None, prepared.task, "teacher", prepared.tokenizer)
    built, _ = student.build_student(run.student, prepared, model, shared=True)
    assert built is model
    online = student.online_part(run.teacher, run.trainer, model)
    assert frozen_weights.weight_memory(online) == 0


def test_transformers_adds_the_adapter_in_the_run_folder_to_its_base(base, prepared, finished):
    folder, trained = finished
    model = models.load(base, None, prepared.task, "teacher", prepared.tokenizer)
    settings = peft.PeftConfig.from_pretrained(folder / "adapter")
    assert settings.base_model_name_or_path == base
    batching = data.Batching(8)
    batch = next(
        iter(data.make_loader(prepared.examples["validation"], prepared.task, 0, batching))
    )
    with torch.no_grad():
        expected = models.logits(trained.eval(), batch.inputs)
        assert not torch.allclose(models.logits(model, batch.inputs), expected, atol=1e-3)
        model.load_adapter(folder / "adapter")
        assert torch.allclose(models.logits(model.eval(), batch.inputs), expected, atol=1e-5)


def test_the_frozen_weights_cost_no_gradients_of_their_own(worlds):
    """Of what torch counts for a step on one token; all activations get a gradient here."""
    model, plain = adapted(worlds["llama"])
    model.get_input_embeddings().weight.requires_grad = True
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=int)}
    with FlopCounterMode(display=False) as step:
        models.logits(model, inputs).sum().backward()
    flops = throughput.training_flops(model, None)
    assert flops == pytest.approx(step.get_total_flops(), rel=0.03)
    assert flops < throughput.training_flops(plain, None)
    assert performance.forwards_of_a_step(plain) == 3
    assert 2 < performance.forwards_of_a_step(model) < 3


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_byte(base, prepared, finished, tmp_path):
    run = run_of(base, "base", **DROPOUT)
    run = replace(run, student=replace(run.student, gradient_checkpointing=True))
    checkpointed = train(run, prepared, tmp_path)
    assert models.fingerprint(checkpointed) == models.fingerprint(finished[1])


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_on_a_gpu_a_resumed_training_ends_with_the_same_bytes(base, tmp_path, quantize):
    run = run_of(base, quantize=quantize)
    run = replace(
        run,
        teacher=replace(run.teacher, quantize="int8", dtype="bfloat16"),
        trainer=replace(run.trainer, accelerator="gpu", precision="bf16-mixed"),
    )
    made = few_examples(prepare.prepare_run(run))
    whole = train(run, made, tmp_path / "whole")
    with pytest.raises(Stop):
        train(run, made, tmp_path / "resumed", stop_at(5))
    resumed = train(run, made, tmp_path / "resumed")
    assert models.fingerprint(resumed) == models.fingerprint(whole)


# ---- quantized teachers


@pytest.mark.parametrize(("mode", "share"), [("int8", 0.25), ("nf4", 0.14)])
def test_a_quantized_teacher_takes_less_memory_and_stays_close(worlds, mode, share):
    pytest.importorskip("torchao")
    made = worlds["llama"]
    model = made.model(hidden_size=64, intermediate_size=256).requires_grad_(False)
    head = model.get_output_embeddings().weight.clone()
    outside = frozen_weights.weight_memory(model.lm_head) * 2
    error = teacher_outputs.quantize_teacher(
        model,
        mode,
        made.task,
        made.loader(batch_size=4),
        lambda one_NC, other_NC: losses.forward_kl(one_NC, other_NC, 1.0),
    )
    blocks = error.bytes_before - outside
    assert error.bytes_after - outside == pytest.approx(share * blocks, rel=0.2)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert error.agreement > {"int8": 0.95, "nf4": 0.5}[mode]
    assert 0 < error.divergence < {"int8": 1e-3, "nf4": 0.1}[mode]


def test_a_quantized_teacher_of_another_tokenizer_is_compared_over_its_own_tokens(worlds, caplog):
    pytest.importorskip("torchao")
    made, loss = worlds["llama"], config.Loss(divergence="uld", temperature=1.0)
    model = made.model().requires_grad_(False)
    before = frozen_weights.weight_memory(model)
    with caplog.at_level("INFO", "distill"):
        student.quantize_teacher(model, "int8", made.prepared, loss, "cpu")
    assert frozen_weights.weight_memory(model) < before
    assert "divergence" in caplog.text


def test_a_teacher_without_layers_that_can_be_quantized_is_named(worlds):
    with pytest.raises(UserError, match=r"teacher\.quantize is int8.*GPT2"):
        frozen_weights.quantizable_layers(worlds["gpt2"].model(), "int8")


@pytest.mark.slow
def test_a_student_of_a_quantized_teacher_is_another_one(base, prepared, finished, tmp_path):
    pytest.importorskip("torchao")
    run = run_of(base, **DROPOUT)
    run = replace(run, teacher=replace(run.teacher, quantize="int8"))
    quantized = train(run, prepared, tmp_path)
    assert models.fingerprint(quantized) != models.fingerprint(finished[1])


# ---- refusals


def test_layers_that_cannot_be_stored_in_4_bits_are_named(worlds):
    with pytest.raises(UserError, match=r"student\.lora\.quantize is nf4.*GPT2"):
        adapted(worlds["gpt2"], quantize="nf4")


def test_targets_that_match_nothing_are_named(worlds):
    with pytest.raises(UserError, match=r"student\.lora\.targets has \*\.qq.*q_proj"):
        adapted(worlds["llama"], targets=["*.qq"])
    with pytest.raises(UserError, match=r"targets has lm_head"):
        adapted(worlds["llama"], targets=["lm_head"])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 0}, "student.lora.rank is 0"),
        ({"alpha": -1}, "student.lora.alpha is -1"),
        ({"dropout": 1.0}, "student.lora.dropout is 1"),
        ({"quantize": "int4"}, "student.lora.quantize is int4"),
    ],
)
def test_settings_that_are_refused(settings, key):
    with pytest.raises(UserError, match=key):
        config.Lora(**settings)


LORA = {"student": {"layers": None, "model": "x", "lora": {"rank": 4}}}
BASE = {"teacher": {"config": None, "model": "x", "outputs": "base", "dtype": "auto"}}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"export": {"format": "lora"}}, ["export.format is lora", "student.lora"]),
        (
            {"student": {"layers": [0], "lora": {}}, "export": {"format": "lora"}},
            ["export.format is lora", "student.model"],
        ),
        (
            LORA | {"export": {"format": "lora", "quantize": "weights"}},
            ["export.quantize is weights"],
        ),
        (BASE, ["teacher.outputs is base", "student.lora"]),
        (LORA | {"teacher": BASE["teacher"] | {"model": "y"}}, ["teacher.model is y", "is x"]),
        (LORA | {"teacher": BASE["teacher"] | {"finetune": {}}}, ["teacher.finetune"]),
        (LORA | BASE | {"trainer": {"compile": True}}, ["trainer.compile"]),
        ({"teacher": {"quantize": "int8"}}, ["teacher.quantize is int8", "teacher.outputs"]),
        ({"teacher": {"outputs": "online", "quantize": "int3"}}, ["teacher.quantize is int3"]),
    ],
    ids=str,
)
def test_keys_that_exclude_each_other(changes, keys):
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    assert all(key in str(caught.value) for key in keys)


def test_a_recipe_whose_auto_is_resolved_is_read_again(base, tmp_path):
    run = training.resolve_auto(run_of(base, "base"))
    compose.save_recipe(run, tmp_path / "recipe.yaml")
    assert compose.load_recipe(str(tmp_path / "recipe.yaml")) == run


def test_compression_while_an_adapter_is_trained_is_refused():
    prune = {"_target_": "distill.callbacks.PruneWeights", "sparsity": 0.5}
    run = tiny(**LORA, callbacks={"prune": prune})
    built = build_callbacks(run.callbacks, run.trainer, run.export)
    with pytest.raises(UserError, match=r"callbacks\.prune.*student\.lora"):
        check_memory(run.student.lora, None, built)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"student\.lora.*peft.*distill\[lora\]"):
        adapters.check_installed(config.Lora())
    monkeypatch.setattr(frozen_weights, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"teacher\.quantize is int8.*torchao"):
        frozen_weights.check_torchao("teacher.quantize", "int8")
