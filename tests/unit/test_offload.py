"""Teachers whose blocks are in the memory of the CPU: where tensors are, and the same outputs."""

from dataclasses import replace

import pytest
import torch

from distill import internals, models, student, teacher
from distill.errors import UserError
from distill.models import frozen_weights, offload
from distill.recipe import config
from distill.recipe.memory_keys import check_memory_keys
from distill.training.loggers import Tracker
from tests.worlds import LANGUAGE, LLAMA, few, tiny

KINDS = {"llama": LLAMA, "gpt2": LANGUAGE, "bert": {}}
COPIES = "cpu:0"  # a name of the CPU for which the hooks are attached


def teacher_of(made, **sizes):
    return made.model(**sizes).eval().requires_grad_(False)


def names_inside(model, blocks):
    inside = {id(tensor) for block in blocks for tensor in block.parameters()}
    return [name for name, tensor in model.named_parameters() if id(tensor) in inside]


def devices(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_block_that_runs_is_on_the_device(kind):
    model, seen = teacher_of(few(**KINDS[kind])), []
    blocks = models.blocks(model)

    def look(*_):
        seen.append([devices(block) for block in blocks])

    ids_BL = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with models.offloaded(model, "meta"), internals.known_padding(False):
        model.to("meta")
        moved = {name for name, tensor in model.named_parameters() if tensor.is_meta}
        assert moved
        assert moved == {*dict(model.named_parameters())} - {*names_inside(model, blocks)}
        for block in blocks:
            [*block.modules()][-1].register_forward_pre_hook(look)
        model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
        assert [devices(block) for block in blocks] == [{"cpu"}] * len(blocks)
    assert seen == [[{"meta"} if each is block else {"cpu"} for each in blocks] for block in blocks]


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, None) for kind in KINDS), ("llama", "int8"), ("llama", "nf4")]
)
def test_outputs_are_the_same_and_nothing_is_left(kind, mode):
    made = few(**KINDS[kind])
    sizes = {"hidden_size": 64, "intermediate_size": 128} if kind != "gpt2" else {}
    model = teacher_of(made, **sizes)
    if mode is not None:
        pytest.importorskip("torchao")
        frozen_weights.quantize_blocks(model, mode)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    (batch, *_) = made.loader()
    expected = models.logits(model, batch.inputs)
    with models.offloaded(model, COPIES):
        assert torch.equal(models.logits(model, batch.inputs), expected)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert devices(model.to("meta")) == {"meta"}


def test_weights_are_on_the_cpu_again_after_an_error():
    made = few(**LLAMA)
    model = teacher_of(made)
    (first, *_) = models.blocks(model)
    with models.offloaded(model, "meta"), pytest.raises(Exception):  # noqa: B017, PT011
        first("no tensor")
    assert devices(model) == {"cpu"}


@pytest.mark.parametrize("outputs", ["online", "cached", "hidden"])
def test_a_student_is_the_same_bytes(tmp_path, monkeypatch, outputs):
    loaded, load = [], offload._Offload.load
    monkeypatch.setattr(offload, "resolve_device", lambda _: COPIES)
    monkeypatch.setattr(
        offload._Offload, "load", lambda self, *args: loaded.append(1) or load(self, *args)
    )
    weights = []
    for value in (False, True):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / f"cache-{value}"))
        assert loaded == []
        weights.append(trained(tmp_path / str(value), outputs, value))
    assert loaded
    assert weights[0] == weights[1]


def trained(folder, outputs, offloads):
    """The weights of a student after the teacher and student stages."""
    made = few(**LANGUAGE)
    made.examples["validation"] = made.examples["validation"].select(range(16))
    run = replace(made.run, teacher=replace(made.run.teacher, outputs=outputs, offload=offloads))
    run.trainer.max_steps = 2
    tracker = Tracker(run, folder)
    model = teacher.obtain(run, made.prepared, folder, tracker)
    prepared = teacher.with_outputs(run, made.prepared, model)
    student.train_student(run, prepared, model, [], folder, tracker)
    return (folder / "student" / "model.safetensors").read_bytes()


def test_what_is_pinned_while_outputs_are_cached_can_be_trained_later(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    hooks = offload._Offload(torch.nn.Linear(2, 2), "cuda", lambda _: None)
    weight = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    with torch.inference_mode():
        pinned = hooks._pinned(weight)
    assert torch.equal(pinned, weight)
    pinned.requires_grad_().sum().backward()


def test_on_a_cpu_it_changes_nothing(caplog):
    model = teacher_of(few(**LLAMA))
    spec = config.Teacher(model="named", outputs="online", offload=True)
    with (
        caplog.at_level("INFO", "distill"),
        models.offloaded_teacher(spec, config.Trainer(accelerator="cpu"), model),
    ):
        assert not any(m._forward_pre_hooks for m in model.modules())
    assert "teacher.offload is true" in caplog.text


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("teacher.outputs=base", {"teacher": {"outputs": "base"}}),
        ("trainer.strategy=fsdp", {"trainer": {"strategy": "fsdp"}}),
        ("trainer.compile=true", {"trainer": {"compile": True}}),
    ],
)
def test_what_needs_weights_in_place_is_refused(key, changes):
    run = tiny(**LANGUAGE)
    run.teacher = replace(run.teacher, offload=True, **changes.get("teacher", {}))
    run.trainer = replace(run.trainer, **changes.get("trainer", {}))
    with pytest.raises(UserError, match=rf"teacher\.offload is true.*{key}"):
        check_memory_keys(run)


def test_a_served_teacher_has_no_weights_to_move():
    with pytest.raises(UserError, match=r"teacher\.offload is set"):
        config.Teacher(outputs="served", url="http://127.0.0.1:1/v1", offload=True)


@pytest.mark.gpu
def test_on_a_gpu_outputs_are_the_same_and_blocks_take_no_memory():
    made = few(**LLAMA)
    model = teacher_of(made, hidden_size=256, intermediate_size=1024)
    (batch, *_) = made.loader()
    inputs = {name: tensor.to("cuda") for name, tensor in batch.inputs.items()}
    with models.on_device("cuda", model):
        expected, complete = models.logits(model, inputs), torch.cuda.memory_allocated()
    with models.offloaded(model, "cuda"), models.on_device("cuda", model):
        offloaded = torch.cuda.memory_allocated()
        for _ in range(2):  # the second time from pinned memory
            assert torch.equal(models.logits(model, inputs), expected)
    assert offloaded < complete / 2
    assert devices(model) == {"cpu"}
