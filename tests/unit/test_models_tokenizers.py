"""Loading a tokenizer, training one, and which one a recipe uses."""

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill import models
from distill.errors import UserError
from distill.tasks import CLASSIFICATION_TOKENS, LANGUAGE_TOKENS
from tests.unit.test_models_loading import TEXTS, assert_sentence, classification


class TestTrainedTokenizer:
    @pytest.mark.parametrize(
        "text", [*TEXTS, "", " ", "unseen Ωords \r\n and\x00bytes ", "it 's , not . cleaned !"]
    )
    def test_decoding_gives_back_what_was_encoded(self, text: str) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, LANGUAGE_TOKENS)
        assert tokenizer.decode(tokenizer.encode(text)) == text

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
    def build(self, vocab_size: int | None = None, **named: str) -> PreTrainedTokenizerBase:
        return models.build_tokenizer(vocab_size, named, classification(), TEXTS)

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
            tokenizer = self.build(**parts)
            assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()

    def test_a_model_that_reads_other_ids_is_refused(self, tmp_path: Path) -> None:
        small, large = self.saved(tmp_path / "small", 290), self.saved(tmp_path / "large", 300)
        for parts, what in (
            ({"teacher": small, "student": large}, "student and tokenizer"),
            ({"teacher": small, "vocab_size": 300}, "teacher and tokenizer"),
        ):
            with pytest.raises(UserError, match=f"vocabularies of {what} differ at 10 ids"):
                self.build(**parts)

    def test_none_at_all_is_refused(self) -> None:
        with pytest.raises(UserError, match="the recipe has no tokenizer"):
            self.build()
