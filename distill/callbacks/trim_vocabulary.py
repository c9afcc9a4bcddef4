"""Vocabulary trimming: tokens that the training texts never use leave the student and its tokenizer."""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.callbacks.base import Compression, compression_config
from distill.compress import tokenizer_trim
from distill.models.architectures import ARCHITECTURES
from distill.module import Distillation

log = logging.getLogger("distill")
CHUNK = 1000  # texts that are tokenised together


class TrimVocabulary(Compression):
    """Keeps the embeddings of the tokens in the training texts, whole, and of those in `keep`: texts, or a file with one a line.

    It acts once training is over: until then teacher and student read the same ids. What the trimmed tokenizer does not know as one
    token it writes in smaller ones.
    """

    stage = "vocabulary"

    def __init__(self, keep: list[str] | str | None = None) -> None:
        super().__init__(1.0, 1.0, "one_shot", 1)
        self.reached = 1.0  # training sees the student in its final form
        self.keep = self._lines(keep) if isinstance(keep, str) else list(keep or [])
        for text in self.keep:
            if not isinstance(text, str):
                raise self.error(f"keep has {text}, but it lists texts: put it in quotation marks")
        self._ids: set[int] = set()  # that occur in training texts

    def _lines(self, keep: str) -> list[str]:
        file = Path(keep).expanduser()
        if not file.is_file():
            raise self.error(
                f"keep is {keep}, but there is no such file: give one with a text a line, or the texts as a list"
            )
        try:
            return file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise self.error(
                f"keep is {keep}, but this file is no text in UTF-8 ({error.reason}): save it as such"
            ) from error

    def prepare(self, module: Distillation) -> None:
        if module.student.get_output_embeddings() is not None:
            raise self.error(
                "the student predicts tokens, but without some it could not follow its teacher: leave this callback out"
            )

    def bind_to_data(self, tokenizer: Any, texts: Iterable[str]) -> None:
        with self.prefix_errors():
            tokenizer_trim.check_supported(tokenizer)
        self._ids = used(tokenizer, texts)

    def change(self, module: Distillation, amount: float) -> None:
        """Nothing while training."""

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        before = student.config.vocab_size
        ids = {
            *self._ids,
            *_written(self.keep, tokenizer),
            *_extremes(student),
            *_before_padding(student),
        }
        kept = tokenizer_trim.ids_to_keep(tokenizer, ids)
        tokenizer_trim.trim_embeddings(student, kept)
        compression_config(student)["vocabulary"] = before
        log.info(
            "vocabulary: %d of %d tokens stay, %.0f %% of the embeddings go",
            len(kept),
            before,
            100 - 100 * len(kept) / before,
        )
        return tokenizer_trim.trim_tokenizer(tokenizer, kept)


def _extremes(student: PreTrainedModel) -> list[int]:
    """Rows with the smallest and the largest value, where all rows share one scale: without them it would be another."""
    weight_VD: Any = student.get_input_embeddings().weight
    name = next(name for name, parameter in student.named_parameters() if parameter is weight_VD)
    if compression_config(student).get("weights", {}).get(name, {}).get("group") != -1:
        return []
    return [int(place) // weight_VD.shape[1] for place in (weight_VD.argmin(), weight_VD.argmax())]


def _before_padding(student: PreTrainedModel) -> range:
    """All ids before the padding id, which then stays what it is, where the model counts positions from it."""
    family = ARCHITECTURES.get(student.config.model_type)
    return range(
        student.config.pad_token_id if family is not None and family.positions_after_pad else 0
    )


def used(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """The ids in which the tokenizer writes these texts, in their whole length."""
    chunks = iter(texts)
    ids: set[int] = set()
    while chunk := list(islice(chunks, CHUNK)):
        ids.update(*tokenizer(chunk, verbose=False)["input_ids"])
    return ids


def _written(texts: list[str], tokenizer: Any) -> set[int]:
    """The ids in which the tokenizer writes these texts, and those of texts that are tokens themselves."""
    known = tokenizer.get_vocab()
    return used(tokenizer, texts) | {known[text] for text in texts if text in known}
