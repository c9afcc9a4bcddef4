"""Loading a tokenizer, training one, and which one a recipe uses."""

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from distill import models
from distill.errors import UserError
from distill.recipe.config import Run, Student, Teacher, Tokenizer
from tests.unit.test_models_loading import BERT, TEXTS, assert_sentence, classification


class TestTrainedTokenizer:
    @pytest.mark.parametrize(
        "text", [*TEXTS, "", " ", "unseen Ωords \r\n and\x00bytes ", "it 's , not . cleaned !"]
    )
    def test_decoding_gives_back_what_was_encoded(self, text: str) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, classification=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_the_same_texts_give_the_same_file_in_every_process(self, tmp_path: Path) -> None:
        lines = "import sys; from distill.models import train_tokenizer\n"
        lines += f"train_tokenizer(iter({TEXTS!r}), 300, True).save_pretrained(sys.argv[1])"
        subprocess.run([sys.executable, "-c", lines, str(tmp_path / "fresh")], check=True)
        for name in ("one", "two"):
            models.train_tokenizer(iter(TEXTS), 300, classification=True).save_pretrained(
                tmp_path / name
            )
        hashes = {
            hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).digest()
            for name in ("fresh", "one", "two")
        }
        assert len(hashes) == 1

    def test_classification_wraps_texts_and_pairs(self) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, classification=True)
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
        tokenizer = models.train_tokenizer(TEXTS, 300, classification=wraps)
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

    def test_texts_that_cannot_fill_it_are_said_in_the_log(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "distill"):
            tokenizer = models.train_tokenizer(["ab ab"], 1000, classification=False)
        assert (
            f"the texts give {len(tokenizer)} tokens, fewer than the 1000 asked for" in caplog.text
        )
        assert len(tokenizer) < 300


class TestLoadTokenizer:
    def test_without_a_padding_token_the_end_token_pads(self, tmp_path: Path) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, classification=False)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        assert models.load_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"

    def test_without_any_such_token_it_is_refused(self, tmp_path: Path) -> None:
        tokenizer = models.train_tokenizer(TEXTS, 300, classification=False)
        tokenizer.pad_token = tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path)
        assert_sentence(
            lambda: models.load_tokenizer(str(tmp_path)), "can neither pad nor end a text"
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


class TestTokenizerFor:
    train = Dataset.from_dict({"text": [*TEXTS, None]})

    def run(self, **parts: object) -> Run:
        return Run(name="x", task={}, **{"student": Student(config=BERT)} | parts)

    def saved(self, folder: Path, size: int) -> str:
        models.train_tokenizer(TEXTS, size, classification=True).save_pretrained(folder)
        return str(folder)

    def test_trained_named_teachers_or_students(self, tmp_path: Path) -> None:
        name = self.saved(tmp_path, 300)
        for parts in (
            {"tokenizer": Tokenizer(vocab_size=300)},
            {"tokenizer": Tokenizer(model=name)},
            {"teacher": Teacher(model=name)},
            {"student": Student(model=name)},
            {"teacher": Teacher(model=name), "student": Student(model=name)},
        ):
            tokenizer = models.build_tokenizer(self.run(**parts), classification(), self.train)
            assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()

    def test_a_model_that_reads_other_ids_is_refused(self, tmp_path: Path) -> None:
        small, large = self.saved(tmp_path / "small", 290), self.saved(tmp_path / "large", 300)
        for parts, what in (
            (
                {"teacher": Teacher(model=small), "student": Student(model=large)},
                "student and tokenizer",
            ),
            (
                {"teacher": Teacher(model=small), "tokenizer": Tokenizer(vocab_size=300)},
                "teacher and tokenizer",
            ),
        ):
            with pytest.raises(UserError, match=f"vocabularies of {what} differ at 10 ids"):
                models.build_tokenizer(self.run(**parts), classification(), self.train)

    def test_none_at_all_is_refused(self) -> None:
        with pytest.raises(UserError, match="the recipe has no tokenizer"):
            models.build_tokenizer(self.run(), classification(), self.train)
