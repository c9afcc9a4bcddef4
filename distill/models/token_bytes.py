"""Tokens of a tokenizer -> their bytes.

Known for the two forms of the tokenizers of language models: bytes written as printable characters
(GPT-2, Llama 3, Qwen), and text with `U+2581` for a space and `<0x0A>` for a byte (Llama 2, Gemma).
"""

import re
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from distill.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PROBES = (
    "The caf\u00e9 opens  at 9:30,\n\tsaid Zo\u00eb \u6771\u4eac \U0001f600.",
    "x = {1: 'a'}",
)


def token_bytes(tokenizer: Any, role: str) -> list[bytes]:
    """The bytes of each token, by id; none for special tokens.

    Args:
        tokenizer: A fast tokenizer.
        role: `teacher` or `student`, for messages.

    Raises:
        UserError: The tokens of a text do not have its bytes, as those that change case do.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = tokenizer.added_tokens_decoder.values()
    # The end of a turn is special, but may be the end of no text.
    special = {*tokenizer.all_special_tokens, *(str(each) for each in tokens if each.special)}
    read = _alphabet_bytes() if _is_byte_level(vocabulary) else None
    made = [b""] * (max(vocabulary.values()) + 1)
    added = {str(each) for each in tokenizer.get_added_vocab()}
    for token, i in vocabulary.items():
        if token in special:
            continue
        made[i] = token.encode() if token in added else _bytes_of(token, read)
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = b"".join(made[i] for i in ids)
        if joined not in (text.encode(), b" " + text.encode()):  # some put a space before a text
            raise UserError(
                f"the {role}'s tokenizer reads {text!r} as {joined.decode(errors='replace')!r}, "
                "but models of different tokenizers are compared by the bytes of their tokens: "
                "take two models with one tokenizer"
            )
    return made


def _is_byte_level(vocabulary: dict[str, int]) -> bool:
    return set(ByteLevel.alphabet()) <= vocabulary.keys()


def _alphabet_bytes() -> dict[str, int]:
    """The byte that each printable character stands for."""
    visible = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = [byte for byte in range(256) if chr(byte) not in visible]
    return visible | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _bytes_of(token: str, read: dict[str, int] | None) -> bytes:
    if read is not None and all(character in read for character in token):
        return bytes(read[character] for character in token)
    match = _BYTE.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()
