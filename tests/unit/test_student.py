import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from distill import corpora, models, student, teacher
from distill.callbacks import Quantize
from distill.corpora import generated_texts
from distill.errors import RunFailed, UserError
from distill.recipe import config
from distill.training import build_callbacks
from distill.training.loggers import Tracker
from tests.grids import sampled
from tests.worlds import LANGUAGE, callbacks_of, world


@pytest.fixture(scope="module")
def made(_module_store):
    return world(teacher={"outputs": "online"}, data={"labelled": 200})


def distilled(made, folder, run=None):
    run = run or made.run
    tracker = Tracker(run, folder)
    model = teacher.obtain(run, made, folder, tracker)
    callbacks = callbacks_of(run, made)
    student.train_student(run, made, model, callbacks, folder, tracker)
    return models.load(
        str(folder / "student"), None, made.task, "student", made.tokenizer, strict=True
    )


def test_the_same_recipe_gives_the_same_weights_bit_for_bit(made, tmp_path):
    assert models.fingerprint(distilled(made, tmp_path / "a")) == models.fingerprint(
        distilled(made, tmp_path / "b")
    )


def test_another_seed_gives_other_weights(made, tmp_path):
    other = replace(made.run, seed=1)
    assert models.fingerprint(distilled(made, tmp_path / "a")) != models.fingerprint(
        distilled(made, tmp_path / "b", other)
    )


def test_the_weights_that_did_best_are_saved(made, tmp_path):
    written = distilled(made, tmp_path)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {f"student.{name}" for name in written.state_dict()} == set(best)
    assert all(
        torch.equal(best[f"student.{name}"], tensor)
        for name, tensor in written.state_dict().items()
    )
    assert written.config.id2label == dict(enumerate(made.task.names))


def test_without_the_teacher_s_weight_only_labelled_examples_are_trained_on(made):
    alone = replace(made.run, loss=config.Loss(alpha=1.0))
    assert len(student.examples_in_loss(made.examples["train"], made.task, alone.loss)) == 200
    assert len(student.examples_in_loss(made.examples["train"], made.task, made.run.loss)) == len(
        made.examples["train"]
    )


def test_a_student_cut_from_all_layers_starts_as_its_teacher(made):
    model = made.model()
    started, classes = student.build_student(config.Student(layers=[0, 1, 2]), made, model)
    batch = next(iter(made.loader()))
    assert classes is None
    assert torch.equal(
        models.logits(started.eval(), batch.inputs), models.logits(model, batch.inputs)
    )


def test_a_student_needs_no_teacher(made, tmp_path):
    alone = replace(
        made.run,
        teacher=None,
        student=config.Student(config=made.run.teacher.config),
        loss=config.Loss(alpha=1.0),
    )
    assert distilled(made, tmp_path, alone).config.num_hidden_layers == 3


# The weights of a served teacher are elsewhere, and a base teacher is the student.
OUTPUTS = [each for each in config.OUTPUTS if each not in ("base", "served")]
WIDTHS = [(307, 300), (300, 307), (320, 384), (384, 384), (300, 300)]


@pytest.mark.parametrize(
    ("outputs", "widths"),
    sampled([(each, widths) for widths in WIDTHS for each in OUTPUTS], rest="slow"),
    ids=str,
)
def test_what_is_trained_is_what_ships_whatever_the_widths(outputs, widths, tmp_path):
    """Plain transformers, which knows of no slice, has the perplexity of the validation run."""
    sizes = LANGUAGE["teacher"]["config"] | {"initializer_range": 0.3}
    own, theirs = ({"config": sizes | {"vocab_size": width}} for width in widths)
    recipe = {**LANGUAGE, "teacher": LANGUAGE["teacher"] | theirs | {"outputs": outputs}}
    made = world(**recipe, student=own | {"layers": None}, tokenizer={"vocab_size": 300})
    for name, split in made.examples.items():
        made.examples[name] = split.select(range(32))
    run = made.run
    model = teacher.obtain(run, made, tmp_path, Tracker(run, tmp_path))
    ready = teacher.with_outputs(run, made.prepared, model)
    results = student.train_student(run, ready, model, [], tmp_path, Tracker(run, tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert plain.config.vocab_size == models.num_logits(plain) == 300
    total = count = 0.0
    for example in made.examples["validation"]:
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits_LV = plain(ids).logits[0, :-1].double()
        predicted = labels[0, 1:] != -100
        total += cross_entropy(logits_LV[predicted], labels[0, 1:][predicted], reduction="sum")
        count += int(predicted.sum())
    assert results["best"]["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_rows_of_tokens_keep_their_bits_and_the_random_numbers_their_order():
    made = world(**LANGUAGE)
    size = len(made.tokenizer)
    wide = made.model("student", vocab_size=size + 84)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    state = torch.get_rng_state()
    models.cut_to_vocabulary(wide, made.tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in wide.state_dict().items():
        cut = before[name][:size] if before[name].shape[0] == size + 84 else before[name]
        assert torch.equal(tensor, cut)
    models.cut_to_vocabulary(wide, made.tokenizer)  # a second time changes nothing
    assert wide.config.vocab_size == models.num_logits(wide) == size


def numbered():
    """The generated corpus with numbers for labels."""
    labels = {
        name: [float(place % 7) for place in range(size)]
        for name, size in generated_texts.GENERATED.items()
    }
    made = corpora.generated()
    return type(made)(
        {
            name: split.remove_columns("label").add_column("label", labels[name])
            for name, split in made.items()
        }
    )


NUMBER = {
    "task": {"_target_": "distill.tasks.Regression"},
    "data": {"source": "tests.unit.test_student.numbered"},
}


@pytest.mark.parametrize("recipe", [{}, LANGUAGE, NUMBER], ids=["classes", "language", "number"])
def test_a_training_that_diverges_is_one_sentence(recipe, tmp_path):
    with pytest.raises(
        RunFailed, match=r"^optimizer\.lr is 1e\+09, .*training diverged.*: lower optimizer\.lr$"
    ):
        distilled(world(**recipe, optimizer={"lr": 1e9}, loss={"alpha": 1.0}), tmp_path)
    assert not (tmp_path / "student").exists()


def turns_nan(student_NC, teacher_NC, temperature):
    """Finite on the example that is tried first, whose logits are of two models."""
    values_N = (student_NC - teacher_NC).square().sum(-1)
    return values_N * (float("nan") if len(values_N) > 5 else 1.0)


def test_a_divergence_of_the_user_that_is_not_finite_is_to_blame_itself(tmp_path):
    path = "tests.unit.test_student.turns_nan"
    with pytest.raises(RunFailed, match=rf"^loss\.divergence is {path}, but .*step 1 became nan"):
        distilled(world(teacher={"outputs": "online"}, loss={"divergence": path}), tmp_path)


class MyQuantize(Quantize):
    """A technique of a user's own, whose name the package does not know."""


def test_what_a_technique_declares_is_checked_against_the_export_s_format():
    specs = {"mine": {"_target_": "tests.unit.test_student.MyQuantize", "bits": 4}}
    trainer = config.Trainer()
    assert build_callbacks(specs, trainer, config.Export(format="packed"))
    with pytest.raises(UserError) as error:
        build_callbacks(specs, trainer, config.Export(format="torchao"))
    assert "callbacks.mine" in str(error.value) and "4" in str(error.value)


def just_a_function():
    return 3


def test_a_callback_that_lightning_cannot_call_is_refused(made, tmp_path):
    run = replace(
        made.run, callbacks={"mine": {"_target_": "tests.unit.test_student.just_a_function"}}
    )
    with pytest.raises(
        UserError,
        match=r"callbacks\.mine is tests\.unit\.test_student\.just_a_function, .*Callback",
    ):
        distilled(made, tmp_path, run)
