"""Loading a tokenizer, training one, and which one a recipe uses."""

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from distill import models
from distill.errors import UserError
from distill.tasks import CLASSIFICATION_TOKENS, LANGUAGE_TOKENS, CausalLanguageModelling
from tests.unit.test_models_loading import TEXTS, assert_sentence, classification


class TestTrainedTokenizer:
    @pytest.mark.parametrize(
        "text", [*TEXTS, "", " ", "unseen Ωords \r\n and\x00bytes ", "it 's , not . cleaned !"]
    )
    def test_decoding_gives_back_what_was_encoded(self, text: str) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.slow
    def test_the_same_texts_give_the_same_file_in_every_process(self, tmp_path: Path) -> None:
        lines = "import sys; from distill.models import train_tokenizer\n"
        lines += f"train_tokenizer(iter({TEXTS!r}), 300).save_pretrained(sys.argv[1])"
        subprocess.run([sys.executable, "-c", lines, str(tmp_path / "fresh")], check=True)
        for name in ("one", "two"):
            models.train_tokenizer(iter(TEXTS), 300).save_pretrained(tmp_path / name)
        hashes = {
            hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).digest()
            for name in ("fresh", "one", "two")
        }
        assert len(hashes) == 1

    def test_classification_wraps_texts_and_pairs(self) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300)
        one = tokenizer.convert_ids_to_tokens(tokenizer("the cat")["input_ids"])
        assert (one[0], one[-1], one.count("[SEP]")) == ("[CLS]", "[SEP]", 1)
        pair = tokenizer.convert_ids_to_tokens(tokenizer("the cat", "the dog")["input_ids"])
        assert (pair[0], pair[-1], pair.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
        assert len(tokenizer("the cat " * 500, truncation=True, max_length=32)["input_ids"]) == 32

    @pytest.mark.parametrize("wraps", [True, False])
    @pytest.mark.parametrize(
        "model_type", ["bert", "distilbert", "roberta", "gpt2", "llama", "qwen2"]
    )
    def test_it_is_the_same_when_loaded_from_beside_any_model(
        self, tmp_path: Path, model_type: str, wraps: bool
    ) -> None:
        tokenizer = models.train_tokenizer(
            TEXTS, 300, CLASSIFICATION_TOKENS if wraps else LANGUAGE_TOKENS
        )
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = models.load_tokenizer(str(tmp_path))
        plain = AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert (
                again(text)["input_ids"] == plain(text)["input_ids"] == tokenizer(text)["input_ids"]
            )
        assert (again.pad_token_id, again.eos_token_id) == (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        assert len(again) == len(plain) == len(tokenizer)
        assert again.model_max_length == tokenizer.model_max_length == 512

    def test_texts_too_few_for_the_size_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "distill"):
            tokenizer = models.train_tokenizer(["ab ab"], 1000, LANGUAGE_TOKENS)
        assert f"{len(tokenizer)} tokens" in caplog.text and "1000" in caplog.text
        assert len(tokenizer) < 300


class TestLoadTokenizer:
    def test_without_a_padding_token_the_end_token_pads(self, tmp_path: Path) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        assert models.load_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"

    def test_without_any_such_token_it_is_refused(self, tmp_path: Path) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        tokenizer.pad_token = tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path)
        assert_sentence(
            lambda: models.load_tokenizer(str(tmp_path)), "tokenizer.model is .* pad_token"
        )

    @pytest.mark.parametrize("model_type", ["bert", "distilbert", "gpt2", "llama"])
    def test_a_model_folder_without_a_tokenizer_is_one_sentence(
        self, tmp_path: Path, model_type: str
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert_sentence(
            lambda: models.load_tokenizer(str(tmp_path), "teacher.model"),
            "teacher.model is .* tokenizer",
        )


class TestBuildTokenizer:
    def build(self, vocab_size: int | None = None, **named: str) -> models.Tokenizers:
        return models.build_tokenizers(vocab_size, named, classification(), TEXTS)

    def saved(self, folder: Path, size: int) -> str:
        models.train_tokenizer(TEXTS, size).save_pretrained(folder)
        return str(folder)

    def test_trained_named_teachers_or_students(self, tmp_path: Path) -> None:
        name = self.saved(tmp_path, 300)
        for parts in (
            {"vocab_size": 300},
            {"tokenizer": name},
            {"teacher": name},
            {"student": name},
            {"teacher": name, "student": name},
        ):
            tokenizer, teacher, _ = self.build(**parts)
            assert teacher is None
            assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()

    def test_a_classifier_reads_with_its_tokenizer_and_its_teacher_with_another(
        self, tmp_path: Path
    ) -> None:
        small, large = self.saved(tmp_path / "small", 290), self.saved(tmp_path / "large", 300)
        for parts in (
            {"teacher": small, "student": large},
            {"teacher": small, "tokenizer": large},
            {"teacher": small, "vocab_size": 300},
        ):
            student, teacher, _ = self.build(**parts)
            assert teacher is not None
            assert (len(student), len(teacher)) == (300, 290)

    def test_models_with_shared_embeddings_must_read_the_same_ids(self, tmp_path: Path) -> None:
        small, large = self.saved(tmp_path / "small", 290), self.saved(tmp_path / "large", 300)
        for parts, what, options in (
            ({"tokenizer": small, "student": large}, "student and tokenizer", {}),
            ({"tokenizer": small, "teacher": large}, "teacher and tokenizer", {"shared": True}),
        ):
            with pytest.raises(UserError, match=f"vocabularies of {what} differ at 10 ids"):
                models.build_tokenizers(None, parts, classification(), TEXTS, **options)

    def test_none_at_all_is_refused(self) -> None:
        with pytest.raises(UserError, match="the recipe has no tokenizer"):
            self.build()


class TestAddedTokens:
    """Language models whose tokenizers differ by added tokens only."""

    def tokenizers(self, *added: str, size: int = 300) -> models.Tokenizers:
        plain = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        more = models.train_tokenizer(TEXTS, size, LANGUAGE_TOKENS)
        more.add_tokens(list(added), special_tokens=True)
        return models.Tokenizers(plain, more)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_the_tokenizer_without_them_encodes_the_examples(self, swapped: bool) -> None:
        plain, more, _ = self.tokenizers("<think>", "</think>")
        student, teacher = (more, plain) if swapped else (plain, more)
        paired = models.pair_tokenizers(student, teacher, CausalLanguageModelling(), teacher)
        assert paired == models.Tokenizers(plain, more)
        models.check_unused(more, plain, TEXTS)

    def test_a_text_that_holds_one_is_refused_by_its_name(self) -> None:
        plain, more, _ = self.tokenizers("<think>", "</think>")
        with pytest.raises(UserError, match="a text holds </think>, but"):
            models.check_unused(more, plain, [*TEXTS, "so</think>it is"])

    def test_texts_that_are_split_differently_are_refused(self) -> None:
        plain, more, _ = self.tokenizers("<think>")
        more.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(UserError, match="differ only in <think>, but they split"):
            models.check_unused(more, plain, ["A Text"])

    def test_other_tokens_or_another_end_of_text_are_refused(self) -> None:
        other = self.tokenizers("<think>", size=310)
        ending = self.tokenizers("<end>")
        assert ending.teacher is not None
        ending.teacher.eos_token = "<end>"
        for plain, more, _ in (other, ending):
            with pytest.raises(UserError, match=r"student and teacher differ at \d+ ids"):
                models.pair_tokenizers(plain, more, CausalLanguageModelling(), more)

    def test_one_tokenizer_is_enough_where_both_encode_alike(self) -> None:
        plain, more, _ = self.tokenizers()
        for task in (CausalLanguageModelling(), classification()):
            paired = models.pair_tokenizers(plain, more, task, more)
            assert paired == models.Tokenizers(more)
