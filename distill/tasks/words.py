"""Texts -> token ids word by word, for tokenizers whose words do not depend on each other.

The tokenizers of BERT and GPT-2 and their like split a text before each space that follows a word,
so that a word with its space has the same tokens in every text. Each is then tokenized once, and
the words of a long text that truncation would remove are not tokenized at all.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

# Pre-tokenizers that remove white space, and normalizers that work on characters between spaces.
REMOVE_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}
# One that keeps white space, and normalizers that neither add nor remove characters beside it.
KEEPS_SPACES = "ByteLevel"
KEEPING_NORMALIZERS = {"Lowercase", "NFC", "NFD"}
WORD_END = re.compile(r"(?<=\S)(?= )")
MOST_WORDS = 100_000  # kept at a time, some 25 MB
LONGEST_WORD = 64  # characters of a word that is kept
COMPARED = 32  # texts that are tokenized both ways before the words are believed
COMPARED_LENGTH = 2000  # characters of them

Ids = list[int]


def encode_words(
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[list[Ids], list[int], None] | None:
    """The ids that the tokenizer gives truncated texts, and 1 for each text that was truncated.

    Returns:
        None if the tokenizer must read full texts; else ids, ones and zeros, and None for the
        token types that a single text does not have.
    """
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return None
    encoder = _word_encoder(tokenizer, len(tokenizer), max_length)
    if encoder is None or not encoder.agrees(texts):
        return None
    return *encoder.encode(texts), None


@lru_cache(maxsize=4)
def _word_encoder(tokenizer: Any, size: int, max_length: int) -> "WordEncoder | None":
    """An encoder that keeps its words between calls; None if words depend on each other.

    Args:
        tokenizer: A fast tokenizer.
        size: Its number of tokens; an encoder of fewer tokens is not used again.
        max_length: Tokens of an example, special ones included.
    """
    if not splits_at_spaces(json.loads(tokenizer.backend_tokenizer.to_str())):
        return None
    encoder = WordEncoder(tokenizer, max_length)
    return encoder if encoder.is_usable else None


def splits_at_spaces(state: dict[str, Any]) -> bool:
    """Whether a text is split before each space that follows a word, whatever surrounds it.

    Args:
        state: The JSON of a fast tokenizer.
    """
    normalizers, splitters = _parts(state["normalizer"]), _parts(state["pre_tokenizer"])
    kinds, added = {part["type"] for part in normalizers}, state["added_tokens"]
    if [part["type"] for part in splitters] == [KEEPS_SPACES]:
        fits = splitters[0].get("use_regex", True) and kinds <= KEEPING_NORMALIZERS
        fits = fits and not any(token["rstrip"] for token in added)
    else:
        fits = {part["type"] for part in splitters} <= REMOVE_SPACES and kinds <= NORMALIZERS
    return (
        fits
        and bool(splitters)
        and not state["model"].get("dropout")
        and all(token["content"].isascii() and " " not in token["content"] for token in added)
    )


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or those in a sequence."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if inner is None else [each for one in inner for each in _parts(one)]


class WordEncoder:
    """Token ids of texts from those of their words.

    Args:
        tokenizer: A fast tokenizer that :func:`splits_at_spaces` accepts.
        max_length: Tokens of an example, special ones included.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.words: dict[str, Ids] = {"": []}
        self.compared = False
        word = self._tokenize(["a"], special=False)[0]
        full = self._tokenize(["a"], special=True)[0]
        room = max_length - len(full) + len(word)
        start = next((at for at in range(len(full)) if full[at : at + len(word)] == word), None)
        # A word of more tokens than there is room must be cut where that shows.
        self.is_usable = bool(word) and start is not None and len(word) <= room < max_length
        self.room, start = room, start or 0
        self.before, self.after = full[:start], full[start + len(word) :]

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether the first texts that this object meets are tokenized as the tokenizer does."""
        if not self.compared:
            some = [text[:COMPARED_LENGTH] for text in texts[:COMPARED]]
            self.is_usable = self.encode(some)[0] == self._tokenize(some, special=True)
            self.compared = True
        return self.is_usable

    def encode(self, texts: Sequence[str]) -> tuple[list[Ids], list[int]]:
        """See :func:`encode_words`."""
        # Most words have a token, so that the first `room + 1` of them fill an example.
        parts = [WORD_END.split(text, self.room + 1) for text in texts]
        known = self._known(word for words in parts for word in words[: self.room + 1])
        ids, truncated = [], []
        for words in parts:
            row: Ids = []
            for word in words[: self.room + 1]:
                row += known[word]
                if len(row) > self.room:
                    break
            else:
                if len(words) > self.room + 1:  # many words without a token
                    row = self._tokenize(["".join(words)], special=False)[0]
            ids.append([*self.before, *row[: self.room], *self.after])
            truncated.append(int(len(row) > self.room))
        return ids, truncated

    def _known(self, words: Iterable[str]) -> dict[str, Ids]:
        """The ids of all these words and of others, of which short ones are kept."""
        if len(self.words) > MOST_WORDS:
            self.words = {"": []}
        unknown = list(dict.fromkeys(word for word in words if word not in self.words))
        if not unknown:
            return self.words
        ids = dict(zip(unknown, self._tokenize(unknown, special=False), strict=True))
        self.words |= {word: each for word, each in ids.items() if len(word) <= LONGEST_WORD}
        return self.words if len(max(unknown, key=len)) <= LONGEST_WORD else self.words | ids

    def _tokenize(self, texts: list[str], special: bool) -> list[Ids]:
        """Token ids of texts, truncated, so that the tokenizer is left as after full texts."""
        ids: list[Ids] = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=special,
            return_token_type_ids=False,
            return_attention_mask=False,
        )["input_ids"]
        return ids
