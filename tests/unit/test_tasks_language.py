"""Windows: every token after the first is predicted once, and its bytes are counted once."""

import logging
import math
import random
from itertools import pairwise

import pytest
import torch
from datasets import Dataset, DatasetDict

from distill import data as pipeline
from distill.errors import UserError
from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from distill.tasks.windows import byte_sizes

DATA = Data(source="none")
TEXTS = [
    "the cat sat on the mat",
    "naïve café — 日本語の文 and 🦊🦊 foxes  \n\t twice",
    "x",
    "  spaces around  ",
    "🦊",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and naïve foxes"] * 4, 300, LANGUAGE_TOKENS)


def examples(encoded):
    return [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]


def encode(text, tokenizer, max_length, **columns):
    data = Data(source="none", text=["text", *columns])
    return examples(
        CausalLanguageModelling(max_length).encode(
            {"text": [text], **{name: [value] for name, value in columns.items()}}, tokenizer, data
        )
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_length", [2, 3, 7, 1000])
def test_windows_of_any_length_predict_each_token_and_byte_once(text, max_length, tokenizer):
    windows = encode(text, tokenizer, max_length)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window["labels"] if token != -100] == ids
    assert sum(window["rows"] for window in windows) == len(ids)
    assert sum(window["size"] for window in windows) == len(text.encode())
    assert all(window["length"] == len(window["input_ids"]) <= max_length for window in windows)
    assert all(
        label in (-100, token)
        for window in windows
        for label, token in zip(window["labels"], window["input_ids"], strict=True)
    )


def test_a_window_begins_with_the_last_token_of_the_one_before(tokenizer):
    windows = encode(TEXTS[0], tokenizer, 4)
    assert windows[0]["input_ids"][0] == tokenizer.eos_token_id
    assert all(
        later["input_ids"][0] == earlier["input_ids"][-1] for earlier, later in pairwise(windows)
    )
    assert all(window["labels"][0] == -100 for window in windows)
    assert [window["truncated"] for window in windows] == [1] + [0] * (len(windows) - 1)


def test_without_a_token_to_begin_with_the_first_is_context_only():
    bare = train_tokenizer(["the cat sat"] * 4, 300, LANGUAGE_TOKENS)
    bare.eos_token = None
    windows = encode(TEXTS[0], bare, 4)
    ids = bare(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window["labels"] if token != -100] == ids[1:]
    assert sum(window["size"] for window in windows) == len(TEXTS[0].encode()) - len(
        bare.decode(ids[:1]).encode()
    )


@pytest.mark.parametrize("max_length", [3, 6, 100])
def test_a_prompt_is_context_only_and_a_completion_ends(max_length, tokenizer):
    windows = encode("the cat sat", tokenizer, max_length, answer=" on the mat")
    answer = tokenizer(" on the mat", add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window["labels"] if token != -100] == [
        *answer,
        tokenizer.eos_token_id,
    ]
    assert sum(window["size"] for window in windows) == len(" on the mat")
    assert all(window["rows"] > 0 for window in windows)


WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "naïve", "foxes"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_length", [2, 3, 8, 17, 64])
def test_a_completion_is_predicted_once_from_the_tokens_before_it(seed, max_length, tokenizer):
    generator = random.Random(seed)
    prompt, answer = (
        " ".join(generator.choices(WORDS, k=generator.choice([0, 1, 5, 40]))) for _ in range(2)
    )
    windows = encode(prompt, tokenizer, max_length, answer=answer)
    before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer))
    start, whole = [tokenizer.eos_token_id], [*before, *after, tokenizer.eos_token_id]
    position = len(before)
    for window in windows:
        context = [label == -100 for label in window["labels"]].index(False)
        ids = window["input_ids"]
        assert window["length"] == len(ids) <= max_length
        assert window["labels"][context:] == ids[context:]
        assert ids[context:] == whole[position : position + len(ids) - context]
        # The context is what precedes, after the start token where there is room for it.
        complete = [*start, *whole[:position]]
        assert ids[:context] in (
            complete,
            [*start, *complete[len(complete) - context + 1 :]],
            complete[len(complete) - context :],
        )
        assert context >= min(len(complete), max(1, max_length // 2))
        assert len(ids) == max_length or position + len(ids) - context == len(whole)
        position += len(ids) - context
    assert position == len(whole)
    assert sum(window["size"] for window in windows) == len(answer.encode())
    assert [window["first_window"] for window in windows] == [1] + [0] * (len(windows) - 1)


@pytest.mark.parametrize("words", [1, 30, 300])
def test_a_completion_that_fits_is_not_separated_from_its_prompt(words, tokenizer):
    (window,) = encode(" the cat" * words, tokenizer, 16, answer=" sat on")
    after = [*tokenizer(" sat on", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    before = tokenizer(" the cat" * words, add_special_tokens=False)["input_ids"]
    room = 15 - len(after)
    assert window["input_ids"] == [tokenizer.eos_token_id, *before[-room:], *after]
    assert window["truncated"] == (2 if len(before) > room else 0)


def test_what_was_shortened_is_counted_by_kind(tokenizer, caplog):
    long, short = "the cat sat on " * 30, "the cat"
    rows = {"text": [short, long, short, long], "answer": [short, short, long, long]}
    data = Data(source="none", text=["text", "answer"], label=None)
    raw = DatasetDict(train=Dataset.from_dict(rows))
    with caplog.at_level(logging.INFO, logger="distill"):
        pipeline.encode(raw, CausalLanguageModelling(16), tokenizer, data)
    counted = [record.getMessage().split(" of the train split")[0] for record in caplog.records]
    assert counted == ["2 of 4 texts", "2 of 4 prompts with their completions"]


def test_a_text_without_tokens_gives_no_window(tokenizer):
    assert encode("", tokenizer, 8) == []


def test_byte_sizes_of_characters_between_and_inside_tokens_are_counted_once():
    assert byte_sizes("né  x ", [(0, 1), (1, 2), (1, 2), (4, 5)]) == [1, 2, 0, 4]
    assert byte_sizes("abcd", [(0, 3), (1, 2), (3, 4)]) == [3, 0, 1]
    assert byte_sizes("", []) == []


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="the tokenizer is Slow, but"):
        encode("x", Slow(), 8)


@pytest.mark.parametrize("max_length", [1, "abc", 12.5])
def test_a_window_must_hold_a_context_and_a_token(max_length):
    with pytest.raises(UserError, match=rf"task.max_length is {max_length!r}, but .* at least 2"):
        CausalLanguageModelling(max_length)


def test_logits_are_compared_with_the_next_token():
    task = CausalLanguageModelling()
    windows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "size": 4},
        {"input_ids": [4, 5], "labels": [-100, 5], "size": 6},
    ]
    batch = task.collate(windows, pad_id=0)
    assert batch.labels.tolist() == [3, 5]
    assert batch.positions.tolist() == [1, 3]
    assert batch.example.tolist() == [0, 1]
    logits = torch.arange(2 * 3 * 7.0).view(2, 3, 7)
    assert torch.equal(task.select_rows(logits, batch), torch.stack([logits[0, 1], logits[1, 0]]))


def test_metrics_are_sums_over_tokens_and_bytes():
    task = CausalLanguageModelling()
    windows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "size": 4},
        {"input_ids": [3, 1], "labels": [-100, 1], "size": 2},
    ]
    batch = task.collate(windows, pad_id=0)
    outcomes = task.outcomes(torch.zeros(3, 8), batch)
    assert outcomes["tokens"].tolist() == [2, 1]
    quality = task.compute_metrics(outcomes)
    assert quality["nll"] == pytest.approx(math.log(8))
    assert quality["perplexity"] == pytest.approx(8)
    assert quality["bits_per_byte"] == pytest.approx(
        3 * 3 / 6
    )  # three tokens of three bits, six bytes
    assert quality["accuracy"] == 0
    assert math.isnan(
        task.compute_metrics({name: column[:0] for name, column in outcomes.items()})["perplexity"]
    )


def test_a_perfect_model_has_no_loss(tokenizer):
    task = CausalLanguageModelling(6)
    batch = task.collate(encode(TEXTS[1], tokenizer, 6), pad_id=tokenizer.pad_token_id)
    ids = batch.inputs["input_ids"]
    oracle = (
        torch.nn.functional.one_hot(ids.roll(-1, dims=1), len(tokenizer)) * 1e4
    )  # at each place, the next token
    quality = task.compute_metrics(task.outcomes(task.select_rows(oracle, batch), batch))
    assert (quality["nll"], quality["bits_per_byte"], quality["accuracy"]) == (0, 0, 1)
