"""Texts that are tokenized word by word have the tokens that the tokenizer gives whole texts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill.tasks.words import WordEncoder, encode_words, splits_at_spaces

TEXTS = ["a cat sees the bird", "don't stop, 12 times!", "Größe naïve  façade\nline", "b 的 的"] * 5
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}


def make(normalizer, splitter, model, trainer, template="[PAD] $A [UNK]", **added):
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.train_from_iterator(TEXTS, trainer(vocab_size=200, special_tokens=[*SPECIAL.values()]))
    pairs = [(token, backend.token_to_id(token)) for token in SPECIAL.values()]
    if template:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **added)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "bert": lambda: make(
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
    ),
    "gpt2": lambda: make(None, BYTES, models.BPE(), trainers.BpeTrainer),
    "roberta": lambda: make(
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        models.BPE(),
        trainers.BpeTrainer,
        extra_special_tokens=["<x>"],
    ),
    "words": lambda: make(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.WhitespaceSplit(),
        models.WordLevel(unk_token="[UNK]"),
        trainers.WordLevelTrainer,
    ),
}
MADE = {}
WORDS = ["cat", "12", "Größe", "e\u0301", "\u0301", "\x00", "\u200b", "[MASK]", "<x>", "🙂", "ﷺ"]
PIECES = st.sampled_from([*WORDS, *" \n\t\x1c\u00a0\u00a8\u2003", "  "])


def tokenizer_of(name):
    return MADE.setdefault(name, TOKENIZERS[name]())


def by_texts(tokenizer, texts, max_length):
    tokens = tokenizer(texts, truncation=True, max_length=max_length)
    return tokens["input_ids"], [int(bool(each.overflowing)) for each in tokens.encodings]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.lists(PIECES, max_size=30).map("".join), min_size=1), st.integers(4, 20))
@settings(max_examples=30, deadline=None)
def test_words_have_the_tokens_of_whole_texts(name, texts, max_length):
    encoder = WordEncoder(tokenizer_of(name), max_length)
    assert encoder.is_usable
    assert encoder.encode(texts) == by_texts(tokenizer_of(name), texts, max_length)
    assert encoder.encode(texts) == by_texts(
        tokenizer_of(name), texts, max_length
    )  # from its words


@pytest.mark.parametrize("name", TOKENIZERS)
def test_these_tokenizers_are_used_by_words(name):
    assert splits_at_spaces(json.loads(tokenizer_of(name).backend_tokenizer.to_str()))
    assert encode_words(tokenizer_of(name), TEXTS, 12)[:2] == by_texts(
        tokenizer_of(name), TEXTS, 12
    )


@pytest.mark.parametrize(
    "splitter",
    [None, pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(use_regex=False)],
    ids=["none", "metaspace", "bytes"],
)
def test_tokenizers_whose_words_depend_on_each_other_read_whole_texts(splitter):
    tokenizer = make(None, splitter, models.BPE(), trainers.BpeTrainer)
    assert encode_words(tokenizer, TEXTS, 12) is None


def test_a_tokenizer_that_grows_is_not_read_from_earlier_words():
    tokenizer = TOKENIZERS["gpt2"]()
    encode_words(tokenizer, TEXTS, 12)
    tokenizer.add_tokens(["sees"])
    assert encode_words(tokenizer, TEXTS, 12)[:2] == by_texts(tokenizer, TEXTS, 12)


def test_only_the_words_that_fit_are_tokenized():
    encoder = WordEncoder(tokenizer_of("gpt2"), 8)
    encoder.encode(["cat " * 3 + " ".join(map(str, range(100_000)))])
    assert len(encoder.words) < 12


def test_the_tokenizer_is_left_as_after_whole_texts():
    by_words, in_full = TOKENIZERS["bert"](), TOKENIZERS["bert"]()
    encode_words(by_words, TEXTS, 12)
    by_texts(in_full, TEXTS, 12)
    assert by_words.backend_tokenizer.truncation == in_full.backend_tokenizer.truncation
