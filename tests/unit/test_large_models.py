"""What large models need: no (B, L, V) at once in any stage, and bytes that fit on a device.

B = texts, L = tokens of a text, V = vocabulary.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from distill import models
from distill.evaluate import outcomes
from distill.export.proof_inputs import compute_rows
from distill.losses import chunk_sizes, chunked
from distill.module import Distillation, loss_functions
from distill.recipe import config
from distill.tasks import CausalLanguageModelling
from distill.teacher_outputs import (
    HiddenStateOutputs,
    LogitOutputs,
    SampledOutputs,
    TopKOutputs,
)
from tests.live_bytes import LiveBytes

GB = 10**9
WIDE = 128_256  # tokens of a large vocabulary


def llama(vocabulary=WIDE, dtype=torch.float32, **sizes):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    } | sizes
    settings = LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **sizes)
    made = LlamaForCausalLM._from_config(settings, dtype=dtype, attn_implementation="sdpa")
    return made.eval()


def batch_of(task, texts=4, length=16):
    examples = [
        {
            "input_ids": list(range(1, length + 1)),
            "labels": [-100, *range(2, length + 1)],
            "size": length,
        }
        for _ in range(texts)
    ]
    return task.collate(examples, 0)


@pytest.fixture
def task():
    return CausalLanguageModelling(max_length=1024)


def evaluated(task, teacher, student, batch):
    loaded, both = {"teacher": teacher, "student": student}, {"teacher": batch, "student": batch}
    outcomes.collect_outcomes(task, loaded, [both])


def proven(task, teacher, student, batch):
    (rows,) = compute_rows(student, [batch], lambda positions, _: positions.flatten(0, 1))
    part = {"next": [1] * 64, "top": [0.0] * 64, "logsumexp": [0.0] * 64}
    ids = batch.inputs["input_ids"]
    one = batch._replace(inputs={"input_ids": ids.reshape(1, -1)})
    task.compare([part | {"ids": ids.flatten().tolist()}], [one], [rows], student.config)


def validated(task, teacher, student, batch):
    module = Distillation(task, student, teacher, config.Loss(), config.Optimizer(), 1)
    with torch.no_grad():
        module.eval().validation_step(batch, 0)


def fine_tuned(task, teacher, student, batch):
    loss = config.Loss(alpha=1.0)
    Distillation(task, student, None, loss, config.Optimizer(), 1).parts(batch)["loss"].backward()


def distilled(task, teacher, student, batch):
    module = Distillation(task, student, teacher, config.Loss(), config.Optimizer(), 1)
    module.parts(batch)["loss"].backward()


def cached(kind, *arguments):
    def run(task, teacher, student, batch):
        with torch.inference_mode():
            kind(teacher, task, *arguments).rows(batch, torch.arange(4).numpy())

    return run


STAGES = {
    "evaluate": evaluated,
    "export": proven,
    "validation": validated,
    "teacher.finetune": fine_tuned,
    "student": distilled,
    "hidden": cached(HiddenStateOutputs),
    "sampled": cached(SampledOutputs, 1.0, WIDE, 50, 0),
    "top_k": cached(TopKOutputs, 1.0, WIDE, 50),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_no_stage_holds_the_logits_of_all_positions(stage, task, monkeypatch):
    monkeypatch.setattr(chunk_sizes, "CHUNK_BYTES", 1 << 21)
    teacher, student, batch = llama(), llama(), batch_of(task)
    everything = 4 * batch.inputs["input_ids"].numel() * WIDE
    with LiveBytes() as live:
        stage(task, teacher, student, batch)
    assert live.peak < everything
    with LiveBytes() as live:
        models.logits(student, batch.inputs)
    assert live.peak >= everything


def test_the_cache_of_logits_holds_one_copy(task, monkeypatch):
    """The stored rows themselves, and a chunk: not the logits of padding, nor a second copy."""
    monkeypatch.setattr(chunk_sizes, "CHUNK_BYTES", 1 << 21)
    batch = batch_of(task)
    with LiveBytes() as live:
        cached(LogitOutputs)(task, llama(), None, batch)
    assert live.peak < 2.5 * 4 * len(batch.labels) * WIDE


def parameters(model):
    return sum(tensor.numel() for tensor in model.parameters())


def model_bytes(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def moment_bytes(model):
    """Of AdamW with 8 bits: codes and a float32 scale for each block of 256; small ones float32."""
    sizes = [tensor.numel() for tensor in model.parameters()]
    in_blocks = [size for size in sizes if size >= 4096 and size % 256 == 0]
    return 2 * (sum(in_blocks) * (1 + 4 / 256) + 4 * (sum(sizes) - sum(in_blocks)))


EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
FOUR = EIGHT | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
def test_a_teacher_of_8_billion_parameters_and_a_student_of_4_fit_on_80_gb(task, monkeypatch):
    # These two ask for values of tensors, which have none here.
    monkeypatch.setattr(models, "has_linear_head", lambda model: True)
    monkeypatch.setattr(loss_functions, "_try", lambda *_: None)
    monkeypatch.setattr(models, "on_device", lambda *_: nullcontext())
    for module in (chunk_sizes, chunked):  # chunks are those of the device
        monkeypatch.setattr(module, "device_memory", lambda _: 80 * GB)
    batches = {texts: batch_of(task, texts, 1024) for texts in (1, 4, 32)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = llama(dtype=torch.bfloat16, **EIGHT)
        student = llama(**FOUR)
        assert 7.9 < parameters(teacher) / GB < 8.1 and 3.9 < parameters(student) / GB < 4.1

        models.set_checkpointing(student, True)
        loss = config.Loss(alpha=0.5)
        module = Distillation(task, student, teacher, loss, config.Optimizer(bits=8), 1)
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            module.parts(batches[4])["loss"].backward()
        train = model_bytes(teacher) + model_bytes(student) + moment_bytes(student) + live.peak

        student = llama(dtype=torch.bfloat16, **FOUR)
        both = dict.fromkeys(("teacher", "student"), batches[32])
        loaded = {"teacher": teacher, "student": student}
        with LiveBytes() as live, torch.no_grad():
            for output in outcomes.run_models(task, loaded, [both], "cpu"):
                outcomes.compare_outputs(task, output.rows, output.batch)
        evaluate = model_bytes(teacher) + model_bytes(student) + live.peak

        proof = llama(**FOUR)
        with LiveBytes() as live:
            (rows,) = compute_rows(proof, [batches[1]], lambda states, _: states[0])
            list(chunked.rows_in_chunks(rows))
        export = model_bytes(proof) + live.peak
    print({"train": train / GB, "evaluate": evaluate / GB, "export": export / GB})
    assert 40 * GB < train < 76 * GB
    assert 24 * GB < evaluate < 40 * GB
    assert 15 * GB < export < 24 * GB
