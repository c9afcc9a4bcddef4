"""A student and its teacher read and end texts alike, or one sentence names what differs."""

import logging
import re

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import pre_tokenizers
from transformers import GenerationConfig

from distill import models, student
from distill.dry_run import DryRun
from distill.errors import UserError
from distill.prepare import end_of_replies, prepare_run
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from tests.worlds import LANGUAGE, tiny

TEXTS = ["1 plus 2 makes 3", "the cat sat on the mat", "a b c"] * 5
PAIRS = LANGUAGE | {
    "data": {
        "source": "tests.unit.test_pair.questions",
        "text": ["question", "reply"],
        "label": None,
    }
}


def questions():
    rows = {"question": TEXTS, "reply": [text[::-1] for text in TEXTS]}
    return DatasetDict({name: Dataset.from_dict(rows) for name in ("train", "validation", "test")})


def tokenizer(**options):
    return models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS | options)


def spaces_first():
    """The same tokens, with a space before each text, and words that may span spaces."""
    other = tokenizer()
    backend = other.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    return other


def test_equal_tokens_that_split_texts_differently_are_refused():
    ours, theirs = tokenizer(), spaces_first()
    theirs.name_or_path = "the/teacher"
    assert ours.get_vocab() == theirs.get_vocab()
    with pytest.raises(UserError, match="tokenizer.model=the/teacher"):
        models.pair_tokenizers(ours, theirs, CausalLanguageModelling(), theirs)


def test_texts_that_begin_with_the_start_token_are_refused():
    start = tokenizer(bos_token="<s>")
    models.check_start(start, ["a <s> within", ""])
    with pytest.raises(UserError, match="begins with <s> .'<s>A text'"):
        models.check_start(start, ["A text", "<s>A text"])
    models.check_start(tokenizer(), ["<s>A text"])
    end = tokenizer().eos_token  # stands before each text, as there is no start token
    models.check_start(tokenizer(), [f"a {end} within"])
    with pytest.raises(UserError, match=f"begins with {re.escape(end)}"):
        models.check_start(tokenizer(), [f"{end}A text"])


def test_another_chat_template_is_named(caplog):
    ours, theirs = tokenizer(), tokenizer()
    turn = "{% for m in messages %}<|x|>{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    theirs.name_or_path = "the/teacher"
    for template, other, count in ((turn, None, 0), (turn, turn + "{# #}", 0), (turn, "end", 1)):
        ours.chat_template, theirs.chat_template = template, other
        caplog.clear()
        models.pair_tokenizers(ours, theirs, CausalLanguageModelling(), theirs)
        assert len(caplog.records) == count
    assert "the/teacher" in caplog.text


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[-100, 9, 5], [9, 8, 5]], 5),
        ([[-100, 9, 5, 10], [9, 8, 5, 10]], 5),  # a line break after the end of a turn
        ([[9, 5], [9, 8], [8, 9]], None),  # most are windows of longer texts
        ([[9, 8], [8, 9]], None),
        ([[]], None),
    ],
)
def test_the_end_of_replies_is_the_last_special_token_of_most(labels, expected):
    special = tokenizer()
    special.add_tokens(["<end>"], special_tokens=True)
    end = special.convert_tokens_to_ids("<end>")
    labels = [[end if each == 5 else each for each in ids] for ids in labels]
    assert models.end_of_replies(labels, special) == (end if expected else None)


@pytest.fixture(scope="module")
def base(_module_store, tmp_path_factory):
    """A base model that stops at another token than the one that ends replies here."""
    made = prepare_run(tiny(**PAIRS))
    folder = tmp_path_factory.mktemp("base")
    model = models.load(None, PAIRS["teacher"]["config"], made.task, "teacher", made.tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=7)
    models.save(model, made.tokenizer, folder)
    return folder


def test_a_student_that_would_never_stop_gets_the_end_of_replies(base, caplog):
    run = tiny(
        **PAIRS
        | {
            "student": {"model": str(base), "layers": None},
            "teacher": None,
            "loss": {"alpha": 1.0},
            "tokenizer": {"vocab_size": None},
        }
    )
    made = prepare_run(run)
    end = made.tokenizer.eos_token_id
    assert end_of_replies(made) == end != 7
    with caplog.at_level(logging.INFO, "distill"):
        built, _ = student.build_student(run.student, made, None)
    assert models.stop_tokens(built, made.tokenizer) == [7, end]
    assert made.tokenizer.eos_token in caplog.text


def test_a_teacher_whose_replies_end_otherwise_is_refused_before_it_is_loaded(base):
    spec = {"model": str(base), "config": None, "outputs": "online", "dtype": "float32"}
    run = tiny(**PAIRS | {"teacher": spec, "tokenizer": {"vocab_size": None}})
    made = prepare_run(run)
    with pytest.raises(UserError, match="<.endoftext.>.*teacher"):
        DryRun(run, made, [], 3).check()
    run.loss.alpha = 1.0  # the labels alone
    DryRun(run, made, [], 3).check()


def test_plain_texts_have_no_end():
    assert end_of_replies(prepare_run(tiny(**LANGUAGE))) is None
