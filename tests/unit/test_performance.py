import ctypes
import logging
import resource
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from distill import models
from distill.errors import UserError
from distill.models import blocks
from distill.processes.memory import keep_freed_memory
from distill.training import build_callbacks, loop, performance
from tests.unit.test_student import distilled
from tests.worlds import world


@pytest.fixture(scope="module")
def made(_module_store):
    return world(teacher={"outputs": "online"}, trainer={"max_steps": 30})


def test_the_cost_of_an_online_teacher_is_logged_with_its_bound(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="distill"):
        distilled(made, tmp_path)
    records = [record for record in caplog.records if "1 + F_T / (3 F_S)" in record.message]
    assert len(records) == 1
    measured, bound = records[0].args
    assert float(measured) > 1
    assert 1 < bound < 3


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


def test_a_compiled_student_has_the_names_and_nearly_the_weights_of_any_other(
    made, tmp_path, monkeypatch, caplog
):
    compiled_blocks = []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compiled_blocks.append(type(self).__name__),
    )
    plain = distilled(made, tmp_path / "plain")
    with caplog.at_level(logging.INFO, logger="distill"):
        compiled = distilled(
            made,
            tmp_path / "compiled",
            replace(made.run, trainer=replace(made.run.trainer, compile=True)),
        )
    assert compiled_blocks == [type(block).__name__ for block in blocks(plain)]
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert "compiling the student took" in caplog.text


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
