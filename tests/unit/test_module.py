import itertools
import logging
import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from datasets import DatasetDict

from distill import losses, teacher
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import config
from distill.training import Training, loop
from tests.grids import sampled
from tests.worlds import LANGUAGE, Rows, world

TASKS = {"classification": {}, "language": LANGUAGE}


@pytest.fixture(scope="module", params=TASKS.values(), ids=TASKS.keys())
def any_world(request, _module_store):
    return world(**request.param)


@pytest.fixture(scope="module")
def small(_module_store):
    return world()


def module_of(made, teacher=None, student=None, classes=None, **loss):
    settings = config.Loss(**loss)
    module = Distillation(
        made.task,
        student or made.model("student", seed=1),
        teacher or made.model(),
        settings,
        config.Optimizer(lr=1e-3),
        10,
    )
    module.classes = classes
    return module


def gradients(module, loader):
    """Sum over the micro-batches of one global batch, as training adds them up; dropout off."""
    module.student.eval()
    module.zero_grad()
    total = 0.0
    for batch in loader:
        loss = module.parts(batch)["loss"]
        loss.backward()
        total += loss.item()
    return total, torch.cat(
        [
            parameter.grad.flatten()
            for parameter in module.parameters()
            if parameter.grad is not None
        ]
    )


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(any_world, accumulate):
    split = any_world.examples["train"].select(range(16))
    any_world.examples["one"] = split
    module = module_of(any_world, alpha=0.3)
    whole, gradient = gradients(module, any_world.loader("one"))
    parts, summed = gradients(module, any_world.loader("one", accumulate=accumulate))
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-6)


def test_cached_outputs_give_the_losses_of_the_teacher_online(any_world):
    made, module = any_world, module_of(any_world, alpha=0.3).eval()
    run = replace(made.run, teacher=replace(made.run.teacher, outputs="cached"))
    examples = DatasetDict(made.examples | {"train": made.examples["test"]})
    cached = teacher.with_outputs(run, replace(made, examples=examples), module.teacher)
    made.examples["cached"] = cached.examples["train"]
    for batch in made.loader("cached", seed=0):
        assert batch.teacher is not None
        torch.testing.assert_close(
            module.parts(batch)["loss"], module.parts(batch._replace(teacher=None))["loss"]
        )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_weighs_the_named_parts(any_world, alpha):
    module = module_of(any_world, alpha=alpha).eval()
    parts = module.parts(next(iter(any_world.loader())))
    assert parts["loss"].item() == pytest.approx(
        alpha * parts["supervised"].item() + (1 - alpha) * parts["divergence"].item(), rel=1e-6
    )
    assert parts["supervised"] > 0
    assert (parts["divergence"] > 0) == (alpha < 1)


def test_a_student_that_is_its_teacher_has_no_divergence(any_world):
    teacher = any_world.model()
    module = module_of(any_world, teacher=teacher, student=any_world.model(), alpha=0.0).eval()
    assert module.parts(next(iter(any_world.loader())))["loss"].item() == 0


def test_unlabelled_examples_take_part_in_the_divergence_alone(small):
    batch = next(iter(small.loader()))
    module = module_of(small, alpha=0.5).eval()
    half = batch.labels.clone()
    half[::2] = -100
    labelled, partly, without = (
        module.parts(batch._replace(labels=labels))
        for labels in (batch.labels, half, torch.full_like(half, -100))
    )
    assert labelled["divergence"] == partly["divergence"] == without["divergence"]
    assert labelled["supervised"] > partly["supervised"] > without["supervised"] == 0


def test_the_teacher_is_outside_the_module_tree(small):
    module = module_of(small)
    module.train()
    teacher = module.teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {id(parameter) for parameter in teacher.parameters()}.isdisjoint(
        id(parameter) for parameter in module.parameters()
    )
    assert set(module.state_dict()) == {f"student.{name}" for name in module.student.state_dict()}


def test_projections_train_and_are_checkpointed_but_are_not_the_student_s(small):
    teacher = small.model(hidden_size=32)
    terms = {"hidden": {"_target_": "distill.terms.HiddenStates", "weight": 2.0, "layers": {0: 1}}}
    module = module_of(small, teacher=teacher, terms=terms, alpha=0.5)
    parts = module.parts(next(iter(small.loader())))
    parts["loss"].backward()
    for term in module.terms.values():
        term.detach()
    rest = 0.5 * parts["supervised"] + 0.5 * parts["divergence"]
    torch.testing.assert_close(parts["loss"], rest + 2.0 * parts["hidden"])
    projections = [name for name in module.state_dict() if name.startswith("terms.")]
    assert len(projections) == 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.terms.parameters())
    assert not any("projection" in name for name in module.student.state_dict())


def test_a_wider_teacher_vocabulary_is_sliced(any_world):
    for chunk in (0, 2):
        module = module_of(any_world, classes=3, alpha=0.0, chunk=chunk).eval()
        taught = module._teacher_logits(next(iter(any_world.loader())))
        assert (taught if isinstance(taught, torch.Tensor) else taught.logits()).shape[-1] == 3


def test_a_divergence_that_does_not_suit_the_logits_is_refused(small):
    with pytest.raises(UserError, match="sigmoid_kl.*forward_kl, reverse_kl"):
        module_of(small, divergence="sigmoid_kl")


PRECISIONS, CLASSES = (torch.float32, torch.bfloat16), (None, 300)


@pytest.mark.parametrize(
    ("divergence", "precision", "classes"),
    sampled(itertools.product(losses.ONE_OF_C, PRECISIONS, CLASSES), every=5),
)
def test_a_language_model_s_loss_is_the_same_in_chunks(divergence, precision, classes):
    made = world(**LANGUAGE)
    student = made.model("student", seed=1, n_layer=1, vocab_size=310 if classes else 300)
    modules = [
        module_of(made, student=student, classes=classes, divergence=divergence, chunk=chunk)
        for chunk in (0, 7, None)
    ]
    made.examples["one"] = made.examples["train"].select(range(16))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        (loss, whole), *parts = [
            gradients(module, made.loader("one", accumulate=3)) for module in modules
        ]
    assert [module.chunked for module in modules] == [False, True, True]
    for value, summed in parts:
        assert value == pytest.approx(loss, rel=1e-5 if precision == torch.float32 else 1e-2)
        assert (summed - whole).norm() < (
            1e-5 if precision == torch.float32 else 2e-2
        ) * whole.norm()


def test_a_divergence_of_one_s_own_is_used(small):
    module = module_of(
        small, divergence="tests.unit.test_module.halfway", beta=0.25, alpha=0.0
    ).eval()
    assert module.parts(next(iter(small.loader())))["loss"].item() == pytest.approx(0.25)


def halfway(student_NC, teacher_NC, temperature, beta):
    return 0 * student_NC.sum(-1) + beta


# ---- under the Trainer


def fitted(made, path, module, callbacks=(), loggers=(), **trainer):
    settings = config.Trainer(
        **{
            "max_steps": 6,
            "validations": 3,
            "precision": "32-true",
            "accelerator": "cpu",
            "progress": False,
        }
        | trainer
    )
    module.steps = settings.max_steps
    train = made.loader(seed=0, accumulate=settings.accumulate)
    validation = made.loader("validation")
    loop.fit(Training(module, train, validation, settings, path, list(loggers), list(callbacks)))
    return module


class Weights(L.Callback):
    """The student after each optimizer step."""

    def __init__(self):
        self.seen, self.training = {}, set()

    def on_train_batch_start(self, trainer, module, *_):
        self.training.add((module.student.training, module.teacher.training))

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[trainer.global_step] = (
            torch.nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
        )


def test_one_step_moves_by_the_learning_rate_whatever_the_accumulation(small, tmp_path):
    """Adam's first step is lr * sign(gradient), which accumulation must not change."""
    ends = []
    for accumulate in (1, 4):
        L.seed_everything(0, verbose=False)
        student = small.model(
            "student", seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        weights = Weights()
        fitted(
            small,
            tmp_path / str(accumulate),
            module_of(small, student=student),
            [weights],
            accumulate=accumulate,
            max_steps=3,
        )
        assert list(weights.seen)[-1] == 3
        ends.append(weights.seen[3])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=2e-4)


def test_the_student_trains_and_the_teacher_does_not(small, tmp_path):
    module, weights = module_of(small), Weights()
    teacher = torch.nn.utils.parameters_to_vector(module.teacher.parameters()).clone()
    fitted(small, tmp_path, module, [weights])
    assert weights.training == {(True, False)}
    assert not torch.equal(weights.seen[1], weights.seen[6])
    assert torch.equal(teacher, torch.nn.utils.parameters_to_vector(module.teacher.parameters()))


def test_validation_follows_the_last_step_and_the_best_weights_stay(small, tmp_path):
    scores = {}

    class Scores(Weights):
        def on_validation_end(self, trainer, module):
            scores[trainer.global_step] = trainer.callback_metrics["val/accuracy"].item()

    weights = Scores()
    module = fitted(
        small, tmp_path, module_of(small, alpha=1.0), [weights], max_steps=7, validations=3
    )
    assert list(scores) == [3, 6, 7]
    best = max(scores, key=scores.get)
    assert torch.equal(
        torch.nn.utils.parameters_to_vector(module.student.parameters()), weights.seen[best]
    )


def test_lightning_s_advice_comes_back_after_an_error():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with pytest.raises(KeyboardInterrupt), loop.silence_lightning():
        raise KeyboardInterrupt
    assert logger.level == before != logging.WARNING


def test_patience_ends_a_training_that_does_not_improve(small, tmp_path):
    weights = Weights()
    module = module_of(small)
    module.settings.lr = 1e-12  # nothing can improve
    fitted(small, tmp_path, module, [weights], max_steps=40, validations=20, patience=2)
    assert len(weights.seen) < 12


def test_the_gradient_is_clipped_and_its_norm_logged(small, tmp_path):
    module = module_of(small)
    module.settings.clip = 1e-3
    norms, written = [], Rows()

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [
                parameter.grad.norm()
                for parameter in module.parameters()
                if parameter.grad is not None
            ]
            if grads:
                norms.append(
                    (torch.stack(grads).norm().item(), written.rows[-1]["train/grad_norm"])
                )

    fitted(small, tmp_path, module, [Norms()], [written])
    assert norms
    assert all(clipped <= 1.01e-3 < logged for clipped, logged in norms)


def test_a_step_is_written_once_whoever_ends_the_training(small, tmp_path):
    """Every n-th step and the last are logged; callbacks see the loss of the step before
    validation.
    """
    seen = {}

    class Ends(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 45

        def on_validation_end(self, trainer, module):
            seen[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    written = Rows()
    fitted(small, tmp_path, module_of(small), [Ends()], [written], max_steps=60, validations=10)
    rows = [row for row in written.rows if "train/loss" in row]
    assert [row["step"] + 1 for row in rows] == list(range(3, 46, 3))
    assert [*seen] == [*range(6, 46, 6), 45]
    assert {row["step"] + 1: row["train/loss"] for row in rows}.items() >= seen.items()


def test_the_rate_warms_up_and_falls(small, tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = module_of(small)
    module.settings.warmup = 0.5
    fitted(small, tmp_path, module, [Rates()], max_steps=8)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert math.isclose(max(rates), module.settings.lr)
    assert math.isclose(rates[-1], 0, abs_tol=1e-9)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_teacher_answers_in_its_own_precision(small, tmp_path, precision):
    seen = set()

    class Dtypes(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.add(module._teacher_logits(batch).dtype)

    module = module_of(small)
    exact = module._teacher_logits(next(iter(small.loader())))
    fitted(small, tmp_path, module, [Dtypes()], precision=precision, max_steps=2)
    assert seen == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module._teacher_logits(next(iter(small.loader()))), exact)
