import ctypes
import logging
import re
import resource
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from distill import models
from distill.errors import UserError
from distill.models import blocks
from distill.processes.memory import keep_freed_memory
from distill.training import build_callbacks, loop, performance, throughput
from tests.unit.test_student import distilled
from tests.worlds import LANGUAGE, LLAMA, world


@pytest.fixture(scope="module")
def made(_module_store):
    return world(teacher={"outputs": "online"}, trainer={"max_steps": 30})


def test_the_cost_of_an_online_teacher_is_logged_with_its_bound(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="distill"):
        distilled(made, tmp_path)
    records = [record for record in caplog.records if "1 + F_T / (3 F_S)" in record.message]
    assert len(records) == 1
    measured, forwards, bound = records[0].args
    assert forwards == 3
    assert float(measured) > 1
    assert 1 < float(bound) < 3


def test_the_bound_is_that_of_the_layers(made):
    """A student that is as large as its teacher: a forward costs a third of a step."""

    class Module:
        student, device = made.model(), torch.device("cpu")

    train, _ = loop.make_loaders(
        made.run,
        made.examples["train"],
        made.examples["validation"],
        made.task,
        made.tokenizer.pad_token_id,
    )
    assert performance.step_cost_bound(Module, made.model(), train) == pytest.approx(4 / 3)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_the_operations_of_attention_are_those_of_its_products(heads, groups):
    """Under sdpa as many as where every product is an operator; keys may be grouped."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": groups}
    made = world(**LLAMA)
    batch = next(iter(made.loader()))
    counts, model = {}, made.model(**changes)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        counts[attention] = performance.forward_flops(model, batch)
    assert counts["sdpa"] == counts["eager"] > 0


def test_a_count_that_fails_is_unknown_and_the_run_ends_well(made, tmp_path, caplog, monkeypatch):
    def fail(counter):
        raise AssertionError("shapes are incompatible")

    monkeypatch.setattr(FlopCounterMode, "get_total_flops", fail)
    with caplog.at_level(logging.INFO, logger="distill"):
        distilled(made, tmp_path)
    assert "1 + F_T / (3 F_S) = unknown" in caplog.text


def recorded_compilations(monkeypatch):
    """What would be compiled, by name; nothing is."""
    recorded = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: recorded.append(function.__name__) or function
    )
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: recorded.append(type(self).__name__)
    )
    return recorded


def test_a_step_is_compiled_as_one_graph_and_the_student_keeps_its_names_and_weights(
    made, tmp_path, monkeypatch, caplog
):
    recorded = recorded_compilations(monkeypatch)
    plain = distilled(made, tmp_path / "plain")
    assert not recorded
    run = replace(made.run, trainer=replace(made.run.trainer, compile=True))
    with caplog.at_level(logging.INFO, logger="distill"):
        compiled = distilled(made, tmp_path / "compiled", run)
    assert recorded == ["_sums_and_peaks"]
    assert models.fingerprint(compiled) == models.fingerprint(plain)
    assert "compiling a step took" in caplog.text


def test_the_blocks_of_student_and_teacher_are_compiled_where_logits_are_many(
    tmp_path, monkeypatch
):
    recorded = recorded_compilations(monkeypatch)
    language = world(**LANGUAGE, trainer={"max_steps": 2, "compile": True})
    student = distilled(language, tmp_path)
    both = [*blocks(student), *blocks(language.model())]
    assert recorded == [type(block).__name__ for block in both]


def test_lengths_are_few_where_a_step_is_compiled(made):
    def lengths(trainer, data):
        run = replace(
            made.run,
            trainer=replace(made.run.trainer, **trainer),
            data=replace(made.run.data, **data),
        )
        splits = made.examples["train"], made.examples["validation"]
        train, _ = loop.make_loaders(run, *splits, made.task, made.pad_id)
        return {batch.inputs["input_ids"].shape[1] for batch in train}

    assert lengths({"compile": True}, {}) <= {8, 16, 24}
    assert lengths({"compile": True}, {"pad_to_multiple_of": 12}) <= {12, 24}
    assert lengths({}, {"pad_to_multiple_of": 7}) <= {7, 14, 21, 24}


def test_speed_leaves_out_validation_and_is_shown_with_it(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="distill"):
        distilled(made, tmp_path)
    assert re.search(r"step 30 of 30: loss .*accuracy .*, [\d,]+ tokens/s", caplog.text)


@pytest.mark.parametrize(
    ("card", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("X", None)]
)
def test_the_peak_of_a_card_is_that_of_its_data_sheet_or_unknown(card, peak):
    assert throughput.peak_flops(card) == peak


@pytest.mark.parametrize("changes", [{}, LANGUAGE, LLAMA], ids=["bert", "gpt2", "llama"])
def test_operations_of_a_step_are_those_that_torch_counts(changes):
    """A step on one token, where attention over other tokens, which does not count, is small."""
    made = world(**changes)
    student, teacher = made.model("student"), made.model()
    if made.task.predicts_tokens:
        student.tie_weights()
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=int)}
    with FlopCounterMode(display=False) as forward:
        models.logits(teacher, inputs)
    assert throughput.forward_flops(teacher) == pytest.approx(forward.get_total_flops(), rel=0.03)
    with FlopCounterMode(display=False) as step:
        models.logits(student, inputs).sum().backward()
    expected = step.get_total_flops()
    assert throughput.training_flops(student, None) == pytest.approx(expected, rel=0.03)
    both = expected + forward.get_total_flops()
    assert throughput.training_flops(student, teacher) == pytest.approx(both, rel=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_student_that_is_really_compiled_learns_the_same(made, tmp_path):
    plain = distilled(made, tmp_path / "plain")
    compiled = distilled(
        made,
        tmp_path / "compiled",
        replace(made.run, trainer=replace(made.run.trainer, compile=True)),
    )
    batch = next(iter(made.loader()))
    torch.testing.assert_close(
        models.logits(compiled, batch.inputs),
        models.logits(plain, batch.inputs),
        rtol=0.05,
        atol=0.05,
    )


def test_compression_and_compilation_exclude_each_other(made):
    pruning = {"_target_": "distill.callbacks.PruneWeights", "sparsity": 0.5}
    run = replace(
        made.run, callbacks={"prune": pruning}, trainer=replace(made.run.trainer, compile=True)
    )
    with pytest.raises(
        UserError, match=r"trainer\.compile is true, but callbacks\.prune changes the student"
    ):
        build_callbacks(run.callbacks, run.trainer, run.export)
    other = replace(
        run, callbacks={"own": {"_target_": f"{Callback.__module__}.{Callback.__name__}"}}
    )
    assert len(build_callbacks(other.callbacks, other.trainer, other.export)) == 1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
DEFAULT_THRESHOLD = 128 * 1024


def page_faults(count=10):
    """Page faults of some allocations of 16 MB that follow one another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_page_faults():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("glibc's allocator only")
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):  # earlier tests may have kept memory
        libc.mallopt(parameter, DEFAULT_THRESHOLD)
    returned = page_faults()
    with keep_freed_memory():
        page_faults()  # the heap grows
        kept = page_faults()
    assert kept < returned / 4
