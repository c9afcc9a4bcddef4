"""Scores of replies against references, computed another way, and their laws."""

import json
from statistics import mean

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from distill.evaluate import measure_replies
from distill.evaluate.inputs import ModelInputs
from distill.evaluate.reply_scores import score_replies
from distill.evaluate.settings import MeasureSettings
from distill.recipe import config
from distill.tasks import CausalLanguageModelling
from tests.unit.test_replies import measured, prepared

WORDS = st.lists(st.sampled_from(["a", "B", "c.", "d", "...", "é"]), max_size=5).map(" ".join)
FIELDS = st.dictionaries(st.sampled_from("xyz"), st.sampled_from([1, True, "1", None, [1]]))
JSON = FIELDS.map(json.dumps)


def scores(pairs):
    found = score_replies(*map(list, zip(*pairs, strict=True)), 50, 0)
    for each in found.values():
        assert 0 <= each.low <= each.value <= each.high <= 1
    return {name: each.value for name, each in found.items()}


def f1_of_lists(ours, theirs):
    """F1 by removing each shared element from a list."""
    rest, shared = list(theirs), 0
    for each in ours:
        if each in rest:
            rest.remove(each)
            shared += 1
    if not ours and not theirs:
        return 1.0
    return 2 * shared / (len(ours) + len(theirs))


def words(text):
    return ["".join(c for c in word.lower() if c != ".") for word in text.split() if word != "..."]


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_words_and_exact_matches_of_texts(pairs):
    found = scores(pairs)
    assert {*found} == {"exact_match", "word_f1"}
    assert found["exact_match"] == pytest.approx(mean(a.strip() == b.strip() for a, b in pairs))
    expected = mean(f1_of_lists(words(reply), words(reference)) for reply, reference in pairs)
    assert found["word_f1"] == pytest.approx(expected)


@given(st.lists(st.tuples(st.one_of(JSON, WORDS, st.just("[1]")), JSON), min_size=1, max_size=6))
def test_fields_of_objects(pairs):
    def fields(text):
        try:
            value = json.loads(text)
        except ValueError:
            return None
        return [(k, repr(v)) for k, v in value.items()] if isinstance(value, dict) else None

    found = scores(pairs)
    read = [(fields(reply), fields(reference)) for reply, reference in pairs]
    assert found["valid_json"] == pytest.approx(mean(ours is not None for ours, _ in read))
    same = [ours is not None and sorted(ours) == sorted(theirs) for ours, theirs in read]
    assert found["exact_object"] == pytest.approx(mean(same))
    # The fields of all replies, told apart by the reply that they are in.
    ours = [(i, each) for i, (reply, _) in enumerate(read) for each in reply or []]
    theirs = [(i, each) for i, (_, reference) in enumerate(read) for each in reference]
    assert found["field_f1"] == pytest.approx(f1_of_lists(ours, theirs))


def test_without_references_there_are_no_scores():
    assert score_replies(["a"], [], 10, 0) == {}


def test_a_reply_that_is_nested_too_deeply_is_no_object():
    deep = "[" * 100_000
    assert scores([(deep, "{}")])["valid_json"] == 0


@pytest.mark.parametrize("learn", ["assistant", "last"])
def test_the_reference_is_the_message_that_the_prompt_asks_for(learn):
    task = CausalLanguageModelling(64, learn=learn)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = {"messages": [task.parse_text(messages, None), task.parse_text(messages[:2], None)]}
    assert task.reference_replies(rows, config.Data(text=["messages"])) == ["d", "b"]


def test_prompts_with_completions_have_references_and_plain_texts_have_none():
    task, rows = CausalLanguageModelling(64), {"ask": ["a", "b"], "reply": ["c", None]}
    assert task.reference_replies(rows, config.Data(text=["ask", "reply"])) == ["c", ""]
    assert task.reference_replies(rows, config.Data(text=["ask"])) == []


ASK = {"role": "user", "content": "ask"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "first"}],
        [ASK, {"role": "assistant", "content": "x", "tool_calls": [CALL]}],
        [ASK, {"role": "assistant", "content": "x", "reasoning_content": "why"}],
    ],
)
def test_what_is_not_only_a_text_after_a_prompt_is_no_reference(messages):
    task = CausalLanguageModelling(64, learn="assistant")
    rows = {"messages": [task.parse_text(messages, None)]}
    assert task.reference_replies(rows, config.Data(text=["messages"])) == [""]


def test_replies_of_a_model_that_are_the_references_score_1(tmp_path):
    run, task, raw, tokenizer, loaded = prepared(tmp_path, ("prompt", "completion"), (0, 1))
    first = measured((run, task, raw, tokenizer, loaded))
    own = [example["student"] for example in first.replies.examples]
    asked = [raw["prompt"][index * len(raw) // 7] for index in range(7)]
    # the last has none: it counts as prompt, but is compared with nothing
    same = Dataset.from_dict({"prompt": asked, "completion": [*own[:-1], ""]})
    result = measured((run, task, same, tokenizer, loaded))
    student, teacher = (result.models[name].scores for name in ("student", "teacher"))
    assert student["exact_match"].value == student["word_f1"].value == 1
    assert teacher["exact_match"].value < 1


def test_a_stop_token_is_no_part_of_the_text(tmp_path):
    run, _, raw, tokenizer, _ = prepared(tmp_path, ("prompt", "completion"), (0, 1))
    text = tokenizer(raw["prompt"][0], add_special_tokens=False)["input_ids"]
    written = measure_replies.Written([], [text, [*text, text[0]]], [text[0]])
    settings = MeasureSettings(config.Evaluate(), run.data, run.trainer, 0)
    source = ModelInputs(tokenizer, None)
    scores = measure_replies._scores(source, written, [raw["prompt"][0]] * 2, settings)
    assert scores["exact_match"].value == 1
