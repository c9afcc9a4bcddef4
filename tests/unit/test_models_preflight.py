"""What must agree before two models may learn from each other, and the fingerprint of a model."""

import logging

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import models
from distill.errors import UserError
from distill.models.preflight import max_positions
from distill.tasks import LANGUAGE_TOKENS, CausalLanguageModelling
from tests.unit.test_models import batch, classification, random


class TestPreflight:
    @pytest.mark.parametrize(
        "names",
        [
            ("red", "green", "blue"),
            ("RED", "Green", "blue"),
            ("0", "1", "2"),
            ("LABEL_0", "LABEL_1", "LABEL_2"),
        ],
    )
    def test_labels_that_agree_are_adopted(self, names: tuple[str, ...]) -> None:
        model, task = random("bert", classification(*names)), classification()
        models.check_labels(model, task, "teacher")
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
        assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}

    def test_another_order_is_refused_at_the_first_id_that_differs(self) -> None:
        model = random("bert", classification("red", "blue", "green"))
        with pytest.raises(
            UserError,
            match=r"teacher's label 1 is blue, but .* green.*\[red, blue, green\]",
        ):
            models.check_labels(model, classification(), "teacher")

    def test_another_number_of_labels_is_refused(self) -> None:
        with pytest.raises(
            UserError, match=r"the teacher has 2 labels \(red, green\), but the data have 3"
        ):
            models.check_labels(
                random("bert", classification("red", "green")), classification(), "teacher"
            )

    def test_texts_longer_than_the_model_are_refused(self) -> None:
        bert, roberta = (random(family, classification()) for family in ("bert", "roberta"))
        assert (max_positions(bert), max_positions(roberta)) == (20, 18)
        models.check_length(roberta, 18, "student")
        with torch.no_grad():
            models.logits(roberta, batch(1, rows=1, length=18))
        with pytest.raises(
            UserError, match=r"task\.max_length is 19, but the student has only 18 positions"
        ):
            models.check_length(roberta, 19, "student")


class TestSharedVocabulary:
    texts = ("one two three four", "two three four five", "five six seven one two")

    def tokenizer(self, size: int = 270) -> PreTrainedTokenizerBase:
        return models.train_tokenizer(self.texts, size, LANGUAGE_TOKENS)

    def model(self, width: int) -> PreTrainedModel:
        return random("gpt2", CausalLanguageModelling(), vocab_size=width)

    def test_equal_widths_need_no_slice(self) -> None:
        assert models.shared_logits(self.tokenizer(), self.model(270), self.model(270)) is None

    def test_padded_embeddings_are_sliced_to_the_tokens_and_the_log_says_so(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = self.tokenizer()
        with caplog.at_level(logging.INFO, "distill"):
            assert (
                models.shared_logits(tokenizer, self.model(270), self.model(288))
                == len(tokenizer)
                == 270
            )
        assert "270 classes, the teacher's 288" in caplog.text

    def test_other_ids_are_refused_by_name(self) -> None:
        with pytest.raises(
            UserError, match=r"student and teacher differ at 5 ids \(265 is nothing and "
        ):
            models.check_vocabulary(self.tokenizer(265), self.tokenizer())

    def test_logits_that_lack_tokens_are_refused(self) -> None:
        with pytest.raises(
            UserError, match="the tokenizer has 270 ids, but the student's logits have 260 classes"
        ):
            models.shared_logits(self.tokenizer(), self.model(260), self.model(270))

    def test_classifiers_need_no_slice(self) -> None:
        ours, theirs = (random("bert", classification(), vocab_size=size) for size in (270, 288))
        assert models.shared_logits(self.tokenizer(), ours, theirs) is None


class TestFingerprint:
    def test_one_bit_changes_it(self) -> None:
        model = random("bert", classification())
        before = models.fingerprint(model)
        bits = models.blocks(model)[1].output.dense.bias.data.view(torch.int32)
        bits[3] ^= 1
        assert models.fingerprint(model) != before
        bits[3] ^= 1
        assert models.fingerprint(model) == before

    def test_memory_layout_and_sharing_do_not(self) -> None:
        model = random("gpt2", CausalLanguageModelling())
        before = models.fingerprint(model)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
        assert model.lm_head.weight is not model.transformer.wte.weight
        assert models.fingerprint(model) == before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_type_does(self, dtype: torch.dtype) -> None:
        model = random("bert", classification())
        assert models.fingerprint(model) != models.fingerprint(model.to(dtype))

    def test_names_and_shapes_do(self) -> None:
        prints = {
            models.fingerprint(nn.ParameterDict({name: torch.zeros(shape)}))
            for name in "ab"
            for shape in ((2, 3), (3, 2), (6,))
        }
        assert len(prints) == 6

    def test_empty_and_scalar_tensors_have_one(self) -> None:
        assert models.fingerprint(nn.ParameterDict({"a": torch.zeros(()), "b": torch.zeros(0, 3)}))
