"""A teacher with another tokenizer: each text is encoded twice, and nothing else differs."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import api, corpora, data, models, student, teacher
from distill.errors import UserError
from distill.evaluate.inputs import inputs_by_model
from distill.module import Distillation
from distill.prepare import prepare_run
from distill.tasks import SingleLabelClassification
from distill.training import loop
from distill.training.loggers import Tracker
from tests.worlds import TINY, tiny

OTHER_TEXTS = ["some other Texts, and 1 2 3", "with ünusual merges merges merges"] * 3
BERT = TINY["teacher"]["config"]
TASKS = {
    "classes": {},
    "number": {
        "task": {"_target_": "distill.tasks.Regression"},
        "data": {"source": "tests.unit.test_student.numbered"},
    },
}


@pytest.fixture(scope="module")
def folder(_module_store, tmp_path_factory):
    """A teacher whose tokenizer and padding id are not those that a student is trained with."""
    path = tmp_path_factory.mktemp("teacher")
    tokens = {"eos_token": "<e>", "pad_token": "<p>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = models.train_tokenizer(OTHER_TEXTS, 290, tokens)
    torch.manual_seed(3)
    config = BERT | {"initializer_range": 0.3, "max_position_embeddings": 64}
    for name, task in (("classes", SingleLabelClassification(24)), ("number", None)):
        made = prepare_run(tiny(**TASKS[name]))
        task = made.task
        model = models.load(None, config, task, "teacher", tokenizer)
        models.save(model, tokenizer, path / name)
    return path


def recipe(folder, task, outputs="cached", **changes):
    return tiny(
        **TASKS[task],
        **changes,
        teacher={"model": str(folder / task), "config": None, "outputs": outputs},
        student={"config": BERT, "layers": None},
    )


@pytest.mark.parametrize("outputs", ["cached", "online"])
@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_s_logits_are_those_of_plain_transformers(folder, task, outputs):
    run = recipe(folder, task, outputs)
    made = prepare_run(run)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / task).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / task)
    assert made.tokenizer.get_vocab() != tokenizer.get_vocab()
    ready = teacher.with_outputs(run, made, plain)
    train = ready.examples["train"].select(range(40))
    pads = made.tokenizer.pad_token_id, tokenizer.pad_token_id
    assert pads[0] != pads[1]
    loader = data.make_loader(
        train, made.task, pads[0], data.Batching(16, seed=1), teacher_pad_id=pads[1]
    )
    for micro, batch in zip(loader.plan, loader, strict=True):
        texts = [made.raw["train"]["text"][index] for index in micro.indices]
        inputs = tokenizer(
            texts, truncation=True, max_length=run.task["max_length"], padding=True,
            return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        with torch.no_grad():
            expected_NC = plain(**inputs).logits
            logits_NC = batch.teacher
            if outputs == "online":
                logits_NC = models.logits(plain, batch.for_teacher().inputs)
        torch.testing.assert_close(logits_NC, expected_NC, rtol=1e-4, atol=1e-5)


def test_cached_and_online_teachers_give_the_same_loss(folder):
    losses = []
    for outputs in ("cached", "online"):
        run = recipe(folder, "classes", outputs)
        made = prepare_run(run)
        model = teacher.obtain(run, made, folder, Tracker(run, folder))
        ready = teacher.with_outputs(run, made, model)
        torch.manual_seed(0)
        small, _ = student.build_student(run.student, made, model)
        train, _ = loop.make_loaders(
            run, ready.examples["train"], ready.examples["validation"], made.task,
            made.tokenizer.pad_token_id, made.for_teacher().tokenizer.pad_token_id,
        )  # fmt: skip
        module = Distillation(made.task, small, model, run.loss)
        module.student.eval()
        losses.append(module.parts(next(iter(train)))["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_model_is_measured_and_saved_with_its_tokenizer(folder, tmp_path):
    run = recipe(folder, "classes")
    made = prepare_run(run)
    tracker = Tracker(run, tmp_path)
    model = teacher.obtain(run, made, tmp_path, tracker)
    ready = teacher.with_outputs(run, made, model)
    student.train_student(run, ready, model, [], tmp_path, tracker)
    saved = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert saved.get_vocab() == made.tokenizer.get_vocab()
    paths = {"teacher": str(folder / "classes"), "student": str(tmp_path / "student")}
    inputs = inputs_by_model(made, run.data, paths, "test")
    theirs = AutoTokenizer.from_pretrained(folder / "classes")
    for name, tokenizer in (("teacher", theirs), ("student", saved)):
        text, ids = made.raw["test"]["text"][0], inputs[name].examples["input_ids"][0]
        assert ids == tokenizer(text, truncation=True, max_length=24)["input_ids"]


def test_a_student_of_a_fine_tuned_teacher_s_layers_shares_its_tokenizer(folder):
    run = replace(recipe(folder, "classes"), student=tiny().student)
    with pytest.raises(UserError, match="vocabularies of teacher and tokenizer differ"):
        prepare_run(run)
    alone = replace(run, tokenizer=type(run.tokenizer)())
    assert prepare_run(alone).teacher is None


def test_terms_that_compare_tokens_are_refused(folder):
    terms = {"states": {"_target_": "distill.terms.HiddenStates", "weight": 1.0, "layers": {0: 0}}}
    with pytest.raises(UserError, match=r"loss\.terms has states, but .*different tokenizers"):
        prepare_run(recipe(folder, "classes", "online", loss={"terms": terms}))


def test_from_python_each_model_is_stored_with_its_tokenizer(folder):
    theirs = AutoTokenizer.from_pretrained(folder / "classes")
    ours = models.train_tokenizer(OTHER_TEXTS, 300)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "classes")
    recipe = {"task": TINY["task"]}
    dataset = corpora.generated()["train"].select(range(8))
    tokenizers = {"teacher": theirs, "student": ours}
    run = api._compose({"config": BERT}, model, tokenizers, dataset, recipe)
    loaded = [AutoTokenizer.from_pretrained(each.model) for each in (run.teacher, run.tokenizer)]
    assert [each.get_vocab() for each in loaded] == [theirs.get_vocab(), ours.get_vocab()]
