"""Vocabulary trimming: tokens that no training text uses are removed from the student."""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.callbacks.compression import Compression
from distill.compress import tokenizer_trim
from distill.compress.groups import PER_TENSOR
from distill.models.positions import counts_from_padding
from distill.module import Distillation
from distill.remote_code.modeling import CompressionConfig

__all__ = ["TrimVocabulary"]

log = logging.getLogger("distill")
BATCH = 1000  # texts in a call of the tokenizer


class TrimVocabulary(Compression):
    """Removes the embeddings of tokens that no training text uses, after training.

    The trimmed tokenizer splits words of other texts into smaller tokens. Texts that use remaining
    tokens only get the same logits as before. Language models are refused.

    Args:
        keep: texts whose tokens are not removed either: a list, or a file with one text per line.

    Raises:
        UserError: if `keep` is not a list of texts, or the file cannot be read.

    Example::

        callbacks:
          vocabulary: {_target_: distill.callbacks.TrimVocabulary, keep: names.txt}
    """

    stage = "vocabulary"

    def __init__(self, keep: list[str] | str | None = None) -> None:
        super().__init__(1.0, 1.0, "one_shot", 1)
        self.progress = 1.0  # it changes nothing during training
        self.keep = self._read_lines(keep) if isinstance(keep, str) else list(keep or [])
        for text in self.keep:
            if not isinstance(text, str):
                raise self.error(f"keep has {text}, but it must list texts: put it in quotes")
        self._ids: set[int] = set()  # ids of all tokens in training texts

    def _read_lines(self, keep: str) -> list[str]:
        file = Path(keep).expanduser()
        if not file.is_file():
            raise self.error(
                f"keep is {keep}, but there is no such file: "
                "give a file with a text in each line, or a list of texts"
            )
        try:
            return file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise self.error(
                f"keep is {keep}, but the file is not in UTF-8 ({error.reason}): save it as UTF-8"
            ) from error

    def prepare(self, module: Distillation) -> None:
        if module.student.get_output_embeddings() is not None:
            raise self.error(
                "the student predicts tokens, but it needs the same tokens as its teacher: "
                "leave this callback out"
            )

    def bind_to_data(self, tokenizer: Any, texts: Iterable[str]) -> None:
        with self.prefix_errors():
            tokenizer_trim.check_supported(tokenizer)
        self._ids = used_ids(tokenizer, texts)

    def change(self, module: Distillation, amount: float) -> None:
        """Does nothing: during training, student and teacher read the same ids."""

    def finish(self, student: PreTrainedModel, tokenizer: Any) -> Any:
        size = student.config.vocab_size
        ids = {
            *self._ids,
            *_ids_to_keep(self.keep, tokenizer),
            *_extreme_rows(student),
            *_ids_before_padding(student),
        }
        kept_ids = tokenizer_trim.ids_to_keep(tokenizer, ids)
        tokenizer_trim.trim_embeddings(student, kept_ids)
        compression = CompressionConfig.from_config(student.config)
        compression.vocabulary = size
        compression.write_to(student.config)
        removed = 100 - 100 * len(kept_ids) / size
        log.info(
            "TrimVocabulary: kept %d of %d tokens, removed %.0f %% of the embeddings",
            *(len(kept_ids), size, removed),
        )
        return tokenizer_trim.trim_tokenizer(tokenizer, kept_ids)


def used_ids(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """The ids of all tokens in these texts, which are not truncated."""
    remaining = iter(texts)
    ids: set[int] = set()
    while batch := list(islice(remaining, BATCH)):
        ids.update(*tokenizer(batch, verbose=False)["input_ids"])
    return ids


def _ids_to_keep(texts: list[str], tokenizer: Any) -> set[int]:
    """The ids of all tokens in these texts, and of those texts that are single tokens."""
    vocabulary = tokenizer.get_vocab()
    return used_ids(tokenizer, texts) | {vocabulary[text] for text in texts if text in vocabulary}


def _extreme_rows(student: PreTrainedModel) -> list[int]:
    """Rows with the smallest and largest weight, if they determine one scale for all rows."""
    weight_VD: Any = student.get_input_embeddings().weight
    name = next(name for name, parameter in student.named_parameters() if parameter is weight_VD)
    weights = CompressionConfig.from_config(student.config).weights
    if name not in weights or weights[name]["group"] != PER_TENSOR:
        return []
    return [int(index) // weight_VD.shape[1] for index in (weight_VD.argmin(), weight_VD.argmax())]


def _ids_before_padding(student: PreTrainedModel) -> range:
    """All ids below the padding id, if position ids start there: the padding id must not change."""
    counted = counts_from_padding(student.config)
    return range(student.config.pad_token_id if counted else 0)
