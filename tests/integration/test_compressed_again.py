"""Compressed models as students and teachers of another run, and foreign code beside a model."""

import json
from dataclasses import replace

import pytest
import torch

from distill import evaluate, models, packing, student, teacher
from distill.compress.restore import strip_quantization
from distill.errors import UserError
from distill.evaluate import cost
from distill.models.saving import has_own_code
from distill.recipe import config
from distill.remote_code.modeling import ActivationQuantLinear
from distill.training.loggers import Tracker
from tests.techniques import technique
from tests.unit.tiny_runs import run_here
from tests.worlds import LANGUAGE, callbacks_of, world

SMALL = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def made(_module_store):
    return world(teacher={"config": SMALL, "outputs": "online"}, student={"layers": [0, 1]})


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr("distill.isolated.run_isolated", run_here)


def distilled(made, folder, callbacks=None, **changes):
    """A run's folder, with its student trained, measured and saved."""
    run = replace(made.run, callbacks=callbacks or {}, **changes)
    tracker = Tracker(run, folder)
    built = callbacks_of(run, made)
    teacher_model = teacher.obtain(run, made, folder, tracker)
    student.train_student(run, made, teacher_model, built, folder, tracker)
    spec = evaluate.export_spec(run.export, run.data, made.prepared, folder / "student")
    with packing.temporary_artefact(spec, folder / "student") as shipped:
        metrics = evaluate.evaluate(run, made.prepared, folder, shipped)
    return folder / "student", metrics


def packed(made):
    return replace(made.run.export, format="packed")


QUANTIZED = {"quantize": technique("Quantize", bits=8, activations="dynamic", start=0.3)}
SPARSE = {"prune": technique("PruneWeights", sparsity=0.5, start=0.2, end=0.6, every=1)}


AGAIN = {"quantize": technique("Quantize", bits=4, group=8, start=0.5)}


@pytest.mark.parametrize(
    ("first", "then"), [(QUANTIZED, {}), (SPARSE, AGAIN)], ids=["quantized", "sparse"]
)
def test_a_compressed_student_trains_on_and_its_record_stays_true(made, first, then, tmp_path):
    """After further training the config names no quantized weights or masks, and packing agrees."""
    folder, _ = distilled(made, tmp_path / "first", first)
    again, metrics = distilled(
        made,
        tmp_path / "again",
        then,
        student=config.Student(model=str(folder)),
        export=packed(made),
    )
    described = json.loads((again / "config.json").read_text()).get("compression") or {}
    assert described.keys() <= ({"weights"} if then else set())
    assert not any(
        isinstance(module, ActivationQuantLinear)
        for module in models.load(str(again), None, made.task, "student").modules()
    )
    assert metrics.form["format"] == "packed"


def test_rounded_inputs_and_factors_follow_one_another(made, tmp_path):
    """A student with quantized activations can be factorized, a factorized one pruned."""
    folder, _ = distilled(made, tmp_path / "first", QUANTIZED)
    factors = {"factors": technique("Factorize", rank=4, start=0.3)}
    folder, _ = distilled(
        made, tmp_path / "second", factors, student=config.Student(model=str(folder))
    )
    distilled(made, tmp_path / "third", SPARSE, student=config.Student(model=str(folder)))


def compressed_teacher(made, kind):
    """A teacher that a config alone cannot describe."""
    from distill.compress import structure, widths

    teacher_model = made.model()
    if kind == "heads":
        for block in models.blocks(teacher_model):
            structure.remove_groups(
                structure.heads(teacher_model, block), torch.tensor([True, False, True, False])
            )
        teacher_model.config.compression = {"shapes": widths.update_config(teacher_model)}
    else:
        teacher_model.config.compression = {
            "weights": {"bert.embeddings.word_embeddings.weight": {"method": "linear", "bits": 8}}
        }
    return teacher_model


def test_layers_are_cut_only_from_ordinary_teachers(made):
    with pytest.raises(UserError, match="the teacher is a compressed model"):
        models.select_layers(compressed_teacher(made, "heads"), [0], None, made.task)
    cut, _ = models.select_layers(compressed_teacher(made, "weights"), [0], None, made.task)
    assert (
        "compression" not in cut.config.to_dict()
    )  # of the teacher's weights, not of the student's


def test_a_gpt2_of_factors_is_loaded_again(tmp_path):
    made = world(**LANGUAGE)
    factors = {"factors": technique("Factorize", rank=2, start=0.3)}
    folder, _ = distilled(made, tmp_path, factors)
    assert models.load(str(folder), None, made.task, "student").config.compression["low_rank"]


def test_what_the_format_cannot_hold_is_said_before_training(tmp_path):
    made = world(**LANGUAGE)
    export = replace(made.run.export, format="torchao")
    with pytest.raises(UserError, match=r"^export.format is torchao, but transformer\.wte\.weight"):
        distilled(made, tmp_path, {"quantize": technique("Quantize", bits=8)}, export=export)
    assert not (tmp_path / "student").exists()


def test_ranges_that_no_step_has_seen_before_the_start_are_those_of_the_first(made, tmp_path):
    static = {"quantize": technique("Quantize", bits=8, activations="static", start=0)}
    folder, _ = distilled(made, tmp_path, static)
    ranges = [
        rounded["range"]
        for rounded in json.loads((folder / "config.json").read_text())["compression"][
            "activations"
        ].values()
    ]
    assert all(low < high for low, high in ranges)


def test_code_beside_a_model_is_run_only_where_it_is_our_own(made, tmp_path):
    """A foreign model that names code is measured without it."""
    teacher_model = made.model()
    models.save(teacher_model, made.tokenizer, tmp_path / "foreign")
    (tmp_path / "foreign" / "evil.py").write_text(
        f"open({str(tmp_path / 'run')!r}, 'w').close()\nclass Evil: pass\n"
    )
    settings = json.loads((tmp_path / "foreign" / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(settings))
    inputs = [{"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}]
    costs, _ = cost.measure_costs(
        cost.model_request({"teacher": tmp_path / "foreign"}, made.task.auto_class, 1, "cpu"),
        {"teacher": cost.TimedInputs(inputs, inputs)},
    )
    assert costs["teacher"].latency_p50_ms > 0
    assert not (tmp_path / "run").exists()
    assert not has_own_code(tmp_path / "foreign")
    shaped = compressed_teacher(made, "heads")
    models.save(shaped, made.tokenizer, tmp_path / "own")
    assert has_own_code(tmp_path / "own")
    (tmp_path / "own" / "modeling.py").write_text("")
    assert not has_own_code(tmp_path / "own")


def test_a_loaded_compressed_model_is_saved_with_its_code(made, tmp_path):
    models.save(compressed_teacher(made, "heads"), made.tokenizer, tmp_path / "one")
    loaded = models.load(str(tmp_path / "one"), None, made.task, "teacher")
    loaded.save_pretrained(tmp_path / "two")
    assert has_own_code(tmp_path / "two")
    batch = next(iter(made.loader()))
    again = models.load(str(tmp_path / "two"), None, made.task, "teacher")
    assert torch.equal(models.logits(loaded, batch.inputs), models.logits(again, batch.inputs))


def test_two_masks_for_one_weight_are_refused(made, tmp_path):
    twice = SPARSE | {"again": technique("PruneWeights", sparsity=0.3, score="movement")}
    with pytest.raises(UserError, match="another PruneWeights has it too"):
        distilled(made, tmp_path, twice)


def test_a_pattern_must_divide_what_others_leave(made, tmp_path):
    pattern = {"prune": technique("PruneWeights", pattern="2:4", start=0.7, end=0.9, every=1)}
    neurons = {"neurons": technique("PruneNeurons", amount=0.3, start=0.2, end=0.5, every=1)}
    with pytest.raises(
        UserError, match="pattern is 2:4, but PruneNeurons leaves layers with 22 inputs"
    ):
        distilled(made, tmp_path / "22", pattern | neurons)
    neurons["neurons"]["amount"] = 0.5
    distilled(made, tmp_path / "16", pattern | neurons)


def test_integers_of_a_library_are_no_model_to_train(made):
    model = made.model()
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(
        UserError, match="the student's weights are stored by torchao, but here they must be floats"
    ):
        models.check_not_quantized(model, "student")


def test_loosened_models_answer_from_the_values_they_had(made):
    model = made.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strip_quantization(model, "student")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
