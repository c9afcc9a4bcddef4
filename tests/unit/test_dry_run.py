"""What can be known from recipe, configs and files is refused before anything is trained."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import dry_run, models
from distill.errors import UserError
from distill.recipe import config
from distill.tasks import SingleLabelClassification
from distill.train import train
from distill.training import loop
from tests.worlds import LANGUAGE, TINY, tiny, world

TEACHER = TINY["teacher"]["config"]
SMALL = TEACHER | {"num_hidden_layers": 1}
FINETUNED = {"finetune": {"epochs": 1, "lr": 1e-3}}
ONLINE = {"config": TEACHER, **FINETUNED, "outputs": "online"}


class Trained(Exception):
    pass


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """The sentence that refuses a recipe whose teacher would be trained first."""

    def fit(training):
        raise Trained

    monkeypatch.setattr(loop, "fit", fit)

    def refuse(**changes):
        section = {"config": TEACHER} | FINETUNED | changes.pop("teacher", {})
        with pytest.raises(UserError) as caught:
            train(tiny(teacher=section, **changes), tmp_path / "run")
        return str(caught.value)

    return refuse


def callback(name, **arguments):
    return {"callbacks": {"x": {"_target_": f"distill.callbacks.{name}", **arguments}}}


def term(name, **arguments):
    spec = {"_target_": f"distill.terms.{name}", "weight": 1.0, **arguments}
    return {"teacher": {"outputs": "online"}, "loss": {"terms": {"x": spec}}}


def from_config(**changes):
    return {"student": {"layers": None, "config": SMALL | changes}}


RECIPES = {
    "a key of no config": (from_config(hiden_size=3), ["student.config", "hiden_size"]),
    "an unknown architecture": (from_config(model_type="brt"), ["model_type is brt", "bert"]),
    "an architecture without the head": (
        {"student": {"layers": None, "config": {"model_type": "clip_vision_model"}}},
        ["student.config.model_type is clip_vision_model"],
    ),
    "sizes that do not fit": (from_config(num_attention_heads=3), ["student", "3"]),
    "too few positions": (from_config(max_position_embeddings=8), ["task.max_length is 24", "8"]),
    "a layer that is not there": ({"student": {"layers": [0, 7]}}, ["student.layers", "7"]),
    "layers for another family": (
        {"student": {"architecture": "gpt2"}},
        ["student.architecture is gpt2"],
    ),
    "a term on a layer that is not there": (term("HiddenStates", layers={0: 5}), ["5"]),
    "relation heads that divide nothing": (
        term("AttentionRelations", student_layer=0, teacher_layer=0, heads=5),
        ["heads", "5"],
    ),
    "a divergence of another task": ({"loss": {"divergence": "binary_kl"}}, ["binary_kl"]),
    "layers of a callback": (callback("PruneLayers", layers=[5]), ["callbacks.x", "5"]),
    "no layer left": (callback("PruneLayers", layers=[0, 1]), ["callbacks.x", "[0, 1]"]),
    "a pattern that matches nothing": (
        callback("Quantize", layers=["*.nothing"]),
        ["callbacks.x", "*.nothing"],
    ),
    "a group that does not divide": (callback("Quantize", bits=4, group=7), ["callbacks.x", "7"]),
    "a pattern of weights": (callback("PruneWeights", pattern="2:5"), ["callbacks.x", "5"]),
    "statistics before the first step": (
        callback("PruneLayers", amount=0.5, start=0.0),
        ["callbacks.x", "step 0"],
    ),
    "an export of the teacher's size": (
        {"student": {"layers": None, "config": TEACHER}},
        ["export.smaller", "export.smaller=false"],
    ),
    "all layers of the teacher": ({"student": {"layers": [0, 1, 2]}}, ["export.smaller"]),
    "sampled outputs of a classifier": (
        {"teacher": {"outputs": "sampled"}},
        ["teacher.outputs is sampled"],
    ),
    "hidden states of a head that caps its logits": (
        LANGUAGE
        | {
            "teacher": {
                "config": {
                    "model_type": "gemma2",
                    "hidden_size": 16,
                    "head_dim": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "intermediate_size": 32,
                    "max_position_embeddings": 32,
                },
                "outputs": "hidden",
            },
            "student": {"layers": [0]},
        },
        ["teacher.outputs is hidden", "Gemma2"],
    ),
    "a language model with a trimmed vocabulary": (
        LANGUAGE
        | {"teacher": LANGUAGE["teacher"] | {"outputs": "online"}}
        | callback("TrimVocabulary"),
        ["callbacks.x", "tokens"],
    ),
}


@pytest.mark.parametrize(("changes", "words"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_refused_before_its_teacher_is_trained(refusal, changes, words):
    sentence = refusal(**changes)
    assert all(word in sentence for word in words), sentence


def test_a_recipe_without_fault_goes_on_to_the_teacher(monkeypatch, tmp_path):
    def fit(training):
        raise Trained

    monkeypatch.setattr(loop, "fit", fit)
    recipes = [
        {},
        callback("Quantize", bits=4),
        callback("PruneNeurons", amount=0.5),
        callback("PruneHeads", amount=0.5),
        callback("PruneWeights", pattern="2:4"),
        callback("Factorize", rank=4),
        term("HiddenStates", layers={0: 1, 1: -1}),
        {"student": {"layers": [0, 1, 2]}, "export": {"smaller": False}},
        {"student": {"layers": [0, 1, 2]}, "export": {"dtype": "bfloat16"}},
        {"student": {"layers": [0, 1, 2]}} | callback("PruneLayers", layers=[1]),
    ]
    for number, changes in enumerate(recipes):
        section = {"config": TEACHER} | FINETUNED | changes.pop("teacher", {})
        with pytest.raises(Trained):
            train(tiny(teacher=section, **changes), tmp_path / str(number))


@pytest.fixture
def stored_student(tmp_path):
    """A folder with a student that is smaller than the teacher, and its tokenizer."""
    made = world()
    models.save(made.model("student", num_hidden_layers=1), made.tokenizer, tmp_path / "stored")
    return tmp_path / "stored"


def test_the_file_of_a_named_student_is_read_before_the_teacher_is_trained(refusal, stored_student):
    weights = stored_student / "model.safetensors"
    tensors = load_file(weights)
    lost = tensors.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(tensors, weights, {"format": "pt"})
    student = {"layers": None, "model": str(stored_student)}
    tokenizer = {"vocab_size": None}
    sentence = refusal(student=student, tokenizer=tokenizer, teacher={})
    assert "student.model" in sentence and "output.dense.weight" in sentence
    save_file(tensors | {"bert.encoder.layer.0.output.dense.weight": lost[:5].clone()}, weights)
    assert "[5, 32]" in refusal(student=student, tokenizer=tokenizer, teacher={})


def test_sizes_by_arithmetic_are_those_of_the_files(tmp_path):
    made = world()
    model = made.model()
    models.save(model, made.tokenizer, tmp_path)
    bare = models.skeleton(None, made.run.teacher.config, made.task, "teacher", made.tokenizer)
    assert {tensor.device.type for tensor in bare.parameters()} == {"meta"}
    assert bare.state_dict().keys() == model.state_dict().keys()
    exact = dry_run.file_bytes(tmp_path)
    assert exact == dry_run.stored_bytes(bare, config.Export())
    half = dry_run.stored_bytes(bare, config.Export(dtype="bfloat16"))
    assert exact / 2 <= half < exact * 0.51  # integers, if any, keep their bytes
    assert dry_run.stored_bytes(bare, config.Export(format="packed", quantize="weights")) is None


def test_tied_tensors_count_once():
    made = world(**LANGUAGE)
    bare = models.skeleton(None, made.run.teacher.config, made.task, "teacher", made.tokenizer)
    parameters = sum(tensor.numel() for tensor in made.model().parameters())
    assert dry_run.stored_bytes(bare, config.Export()) == 4 * parameters


def test_a_dry_run_changes_no_result(tmp_path, monkeypatch):
    def trained(folder):
        train(tiny(trainer={"max_steps": 2, "validations": 1}), folder)
        return load_file(folder / "student" / "model.safetensors")

    unmeasured = SimpleNamespace(to_json=dict)
    monkeypatch.setattr("distill.train._measure_and_export", lambda *_: unmeasured)
    checked = trained(tmp_path / "with")
    monkeypatch.setattr(dry_run.DryRun, "check", lambda self: None)
    plain = trained(tmp_path / "without")
    assert checked.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in checked.items())


def test_a_model_without_weights_is_refused_as_one_with_them():
    task = SingleLabelClassification()
    task.names = ("a", "b")
    with pytest.raises(UserError, match=r"teacher\.config has hiden_size"):
        models.skeleton(None, {"model_type": "bert", "hiden_size": 3}, task, "teacher", None)
