import io
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import DatasetDict
from omegaconf import OmegaConf

from distill import data, models, store, student, teacher, teacher_outputs
from distill.errors import RunFailed, UserError
from distill.tasks import SingleLabelClassification
from distill.teacher_outputs import output_cache
from distill.training import loop, resolve_auto
from distill.training.loggers import Tracker
from tests.worlds import LANGUAGE, world

FINETUNE = {"finetune": {"epochs": 1, "lr": 1e-3}}


@pytest.fixture(scope="module")
def finetuning(_module_store):
    return world(teacher=FINETUNE, data={"labelled": 64})


@pytest.fixture(scope="module")
def online(_module_store):
    return world(teacher={"outputs": "online"})


def obtained(made, folder, **changes):
    run = replace(made.run, **changes)
    return teacher.obtain(run, made, folder, Tracker(run, folder))


@pytest.fixture
def trainings(monkeypatch):
    """How often something is trained."""
    calls, fitted = [], loop.fit

    def counted(training):
        calls.append(training)
        return fitted(training)

    monkeypatch.setattr(loop, "fit", counted)
    return calls


# ---- fine-tuning


def test_a_second_run_uses_the_same_teacher_without_training(
    finetuning, tmp_path, trainings, monkeypatch
):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    first = obtained(finetuning, tmp_path / "first")
    again = obtained(finetuning, tmp_path / "again")
    assert len(trainings) == 1
    assert models.fingerprint(first) == models.fingerprint(again)
    assert (tmp_path / "again" / "teacher" / "model.safetensors").is_file()


BASE = {"teacher": FINETUNE, "data": {"labelled": 64}}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optimizer": {"weight_decay": 0.5}},
        {"teacher": {"finetune": {"lr": 2e-3}}},
        {"teacher": {"config": {"hidden_size": 8}}},
        {"data": {"batch_size": 8}},
        {"data": {"labelled": 60}},
        {"task": {"max_length": 20}},
        {"tokenizer": {"vocab_size": 310}},
    ],
    ids=str,
)
def test_another_ingredient_is_another_teacher(change, labelled_entry):
    assert labelled_entry != entry_of(**OmegaConf.to_container(OmegaConf.merge(BASE, change)))


@pytest.fixture(scope="module")
def labelled_entry(_module_store):
    first, again = entry_of(**BASE), entry_of(**BASE)
    assert first == again
    return first


def entry_of(**recipe):
    made = world(**recipe)
    torch.manual_seed(made.run.seed)
    loaded = models.load(None, made.run.teacher.config, made.task, "teacher", made.tokenizer)
    labelled = DatasetDict(
        made.examples | {"train": data.only_labelled(made.examples["train"], made.task)}
    )
    return store.entry_path("teachers", teacher._ingredients(made.run, made.task, labelled, loaded))


class Weighted(SingleLabelClassification):
    """A task of a user's own, with an argument that changes its loss."""

    def __init__(self, max_length=128, weight=1.0):
        super().__init__(max_length)
        self.weight = weight


def test_a_task_s_own_arguments_its_module_and_our_version_are_ingredients(monkeypatch):
    tasks = [SingleLabelClassification(24), Weighted(24), Weighted(24, weight=2.0)]
    elsewhere = type(
        "SingleLabelClassification", (SingleLabelClassification,), {"__module__": "mine"}
    )(24)
    keys = [
        store.entry_path("any", {"made by": teacher._made_by(task)}) for task in [*tasks, elsewhere]
    ]
    assert len(set(keys)) == 4
    assert keys[1] == store.entry_path("any", {"made by": teacher._made_by(Weighted(24))})
    monkeypatch.setattr(teacher, "VERSION", teacher.VERSION + 1)
    assert keys[1] != store.entry_path("any", {"made by": teacher._made_by(tasks[1])})


def test_a_fine_tuning_that_diverges_names_its_rate_and_leaves_no_teacher(
    finetuning, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    settings = replace(
        finetuning.run.teacher, finetune=replace(finetuning.run.teacher.finetune, lr=1e9)
    )
    with pytest.raises(
        RunFailed,
        match=r"teacher\.finetune\.lr is 1e\+09, .*diverged.*: lower teacher\.finetune\.lr$",
    ):
        obtained(finetuning, tmp_path / "run", teacher=settings)
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_a_damaged_teacher_is_trained_again(finetuning, tmp_path, trainings, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    first = obtained(finetuning, tmp_path / "first")
    file = next((tmp_path / "store" / "teachers").rglob("model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the run folder's link keeps the sound file
    file.write_bytes(content)
    again = obtained(finetuning, tmp_path / "again")
    assert len(trainings) == 2
    assert models.fingerprint(first) == models.fingerprint(again)


def test_an_interrupted_fine_tuning_leaves_no_teacher(finetuning, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtained(finetuning, tmp_path / "run")
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_the_teacher_is_frozen_and_answers_in_its_dtype(online, tmp_path):
    run = replace(online.run, teacher=replace(online.run.teacher, dtype="bfloat16"))
    loaded = obtained(online, tmp_path, teacher=run.teacher)
    answering = models.in_dtype(loaded, "bfloat16", copies=True)
    assert not answering.training
    assert {(parameter.dtype, parameter.requires_grad) for parameter in answering.parameters()} == {
        (torch.bfloat16, False)
    }
    assert loaded.dtype == torch.float32  # for the student that is cut from it
    assert (
        student.online_part(run.teacher, run.trainer, loaded).dtype == torch.bfloat16
    )  # when it has been


def test_the_teacher_answers_in_bf16_where_the_device_has_units_for_it(online, monkeypatch):
    run = replace(
        online.run,
        teacher=replace(online.run.teacher, dtype="auto"),
        trainer=replace(online.run.trainer, accelerator="cpu"),
    )
    for has_units, dtype, precision in (
        (True, "bfloat16", "bf16-mixed"),
        (False, "float32", "32-true"),
    ):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda has_units=has_units: has_units
        )
        assert models.resolve_teacher_dtype(run.teacher, run.trainer) == dtype
        decided = resolve_auto(replace(run, trainer=replace(run.trainer, precision="auto")))
        assert (decided.teacher.dtype, decided.trainer.precision) == (dtype, precision)
    assert resolve_auto(replace(run, teacher=None)).teacher is None


def test_a_random_teacher_is_kept_in_the_run_folder(online, tmp_path):
    loaded = obtained(online, tmp_path)
    kept = models.load(
        str(tmp_path / "teacher"), None, online.task, "teacher", online.tokenizer, strict=True
    )
    assert models.fingerprint(kept) == models.fingerprint(loaded)


# ---- cached outputs


def cached(made, model=None, **changes):
    run = replace(made.run, teacher=replace(made.run.teacher, outputs="cached"), **changes)
    return teacher.with_outputs(run, made, model or made.model()).examples["train"]


@pytest.mark.parametrize("recipe", [{}, LANGUAGE], ids=["classification", "language"])
def test_outputs_are_beside_their_examples_in_any_order(recipe):
    made = world(**recipe)
    model = made.model()
    made.examples["cached"] = cached(made, model).shuffle(seed=3).select(range(50))
    for batch in made.loader("cached", seed=5, accumulate=2):
        with torch.no_grad():
            online = made.task.select_rows(models.logits(model, batch.inputs), batch)
        torch.testing.assert_close(batch.teacher, online, rtol=1e-4, atol=1e-5)


def test_outputs_are_computed_once(online, monkeypatch):
    cached(online)
    monkeypatch.setattr(output_cache, "write_outputs", lambda *_: pytest.fail("computed again"))
    cached(online)


def test_another_ingredient_is_another_cache(online):
    model, other = online.model(), online.model(seed=1)
    key = [cached(online, one)["teacher_logits"][0] for one in (model, other)]
    assert key[0] != key[1]
    fewer = replace_examples(online, online.examples["train"].select(range(30)))
    assert len(cached(fewer, model)) == 30
    backwards = replace_examples(online, online.examples["train"].select(range(30)[::-1]))
    assert (
        cached(backwards, model)["teacher_logits"][0] == cached(fewer, model)["teacher_logits"][29]
    )


def replace_examples(made, train):
    return replace(made, examples=type(made.examples)(made.examples | {"train": train}))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_outputs_are_never_used(online, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    sound = cached(online)["teacher_logits"][:]
    file = next(tmp_path.rglob("outputs.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.unlink()
    file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert cached(online)["teacher_logits"][:] == sound


def test_an_interrupted_cache_leaves_nothing(online, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output_cache, "run_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(online)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_outputs_too_large_for_the_disk_are_refused(online, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(
        output_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(UserError, match="teacher.outputs=online"):
        cached(online)


@pytest.mark.parametrize("recipe", [{}, LANGUAGE], ids=["classification", "language"])
def test_small_chunks_hold_the_same_outputs(recipe, tmp_path, monkeypatch):
    made = world(**recipe)
    made.examples["train"] = made.examples["train"].select(range(40))
    whole = cached(made)["teacher_logits"][:]
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(output_cache, "CHUNK_BYTES", 3000)
    for outputs, expected in zip(cached(made)["teacher_logits"][:], whole, strict=True):
        torch.testing.assert_close(
            torch.tensor(outputs), torch.tensor(expected), rtol=1e-4, atol=1e-5
        )
    with pa.ipc.open_stream(next(tmp_path.rglob("outputs.arrow"))) as stream:
        assert len(list(stream)) > 3 if recipe else len(list(stream)) == 1


def test_chunks_are_cut_by_the_bytes_of_their_outputs(online):
    examples = (
        online.examples["train"]
        .select(range(6))
        .remove_columns("rows")
        .add_column("rows", [1, 1, 1, 9, 1, 1])
    )
    assert output_cache.split_chunks(
        examples, output_cache.CHUNK_BYTES // output_cache.FLOAT_BYTES // 2
    ) == [
        range(2),
        range(2, 4),
        range(4, 6),
    ]
    assert output_cache.split_chunks(examples, 4) == [range(6)]


def test_outputs_stay_in_numpy_s_buffers(online):
    split = online.examples["train"].select(range(20))
    kept = teacher_outputs.LogitOutputs(online.model(), online.task)
    loader = data.make_loader(split, online.task, online.pad_id, data.Batching(8))
    rows = output_cache.run_teacher(kept, loader, range(20), lambda count: None)
    outputs = output_cache.to_columns(kept, rows)["teacher_logits"]
    assert outputs.type == pa.list_(
        pa.list_(pa.float32(), len(online.task.names))
    )  # rows are counted in 32 bits, not their numbers
    assert np.shares_memory(
        outputs.flatten().flatten().to_numpy(), outputs.values.values.to_numpy()
    )


def test_the_outputs_device_is_the_recipe_s_and_part_of_their_key(online, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cached(online)  # trainer.accelerator is cpu
    monkeypatch.setattr(models, "resolve_device", lambda trainer: "cuda")
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(output_cache, "write_outputs", lambda *_: 1 / 0)
        cached(online)


@pytest.mark.gpu
def test_the_teacher_comes_back_from_the_gpu_fit_for_training(online, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    model = online.model()
    cached(online, model, trainer=replace(online.run.trainer, accelerator="gpu"))
    assert model.device.type == "cpu"
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.gpu
def test_a_language_model_on_the_gpu_is_compared_with_its_texts(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    made = world(**LANGUAGE)
    run = replace(
        made.run,
        teacher=replace(made.run.teacher, dtype="bfloat16"),
        trainer=replace(made.run.trainer, accelerator="gpu"),
    )
    with caplog.at_level("INFO"):
        teacher.with_outputs(run, made, made.model())
    assert "perplexity" in caplog.text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_how_far_the_outputs_are(online, tmp_path, monkeypatch, terminal):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdout", Terminal(terminal))
    online_with_progress = replace(
        online, run=replace(online.run, trainer=replace(online.run.trainer, progress=True))
    )
    cached(online_with_progress)
    assert ("teacher outputs" in sys.stdout.getvalue()) == terminal


class Terminal(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_training_from_the_cache_is_training_online(online, tmp_path):
    """The weights differ by the rounding of the teacher's batches only."""
    ends = []
    for outputs in ("online", "cached"):
        run = replace(online.run, teacher=replace(online.run.teacher, outputs=outputs))
        model = teacher.obtain(run, online, tmp_path / outputs, Tracker(run, tmp_path / outputs))
        examples = type(online.examples)(
            online.examples | {"train": teacher.with_outputs(run, online, model).examples["train"]}
        )
        student.train_student(
            run,
            replace(online, examples=examples),
            model,
            [],
            tmp_path / outputs,
            Tracker(run, tmp_path / outputs),
        )
        trained = models.load(str(tmp_path / outputs / "student"), None, online.task, "student")
        ends.append(torch.nn.utils.parameters_to_vector(trained.parameters()))
    assert (ends[0] - ends[1]).abs().max() < 1e-4
