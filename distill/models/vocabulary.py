"""Vocabularies of two tokenizers: equal ids, or equal but for tokens that were added to one."""

import logging
import re
from collections.abc import Iterable, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError

log = logging.getLogger("distill")
MAX_SHOWN = 3  # tokens in a message
MAX_CHARACTERS = 40  # of a text in a message
COMPARED_TEXTS = 200  # texts that two tokenizers must encode to the same ids
# Texts in which tokenizers differ: case, accents, white space, scripts, digits, emoji, code, turns.
PROBES = (
    "Crème BRÛLÉE  for 42,50 €",
    "naïve\tcafé 東京 😀\n",
    " don't stop: e-mail a_b@c.org!?",
    "",
    "1234567890 3.14 1,000,000 ½ ٢٠٢٦",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 ﬁ \u200b\xa0x",
    "def f(x):\n    return [x ** 2,\t{'a': None}]  # ok\r\n\n\n",
    "  two   three    four     spaces ",
    "<|im_start|>user\nHi<|im_end|>\n<start_of_turn>model\n[INST] Hi [/INST] </s>",
)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that a model needs: the highest id of a token, plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Check that two vocabularies agree, for models that read the same encoded examples.

    Args:
        tokenizer: Compared with `reference`.
        reference: The tokenizer that encodes the examples.
        names: The owners of the two tokenizers, for the message.

    Raises:
        UserError: Ids have different tokens; the message has the first ones.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    expected = {i: token for token, i in reference.get_vocab().items()}
    differing = [
        i for i in sorted(tokens.keys() | expected.keys()) if tokens.get(i) != expected.get(i)
    ]
    if differing:
        shown = "; ".join(
            f"{i} is {tokens.get(i, 'nothing')} and {expected.get(i, 'nothing')}"
            for i in differing[:MAX_SHOWN]
        )
        raise UserError(
            f"the vocabularies of {names[0]} and {names[1]} differ at {len(differing)} ids "
            f"({shown}), but both must read the same ids: take two models with one tokenizer, "
            "or build the student from the teacher's layers"
        )


def encode_alike(
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    texts: Sequence[str] = PROBES,
) -> bool:
    """Whether two tokenizers encode texts and pairs, and pad them, with the same ids."""
    if tokenizer.get_vocab() != other.get_vocab() or tokenizer.pad_token_id != other.pad_token_id:
        return False
    return _same_ids(tokenizer, other, texts)


def check_splits(tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """Check that the student's tokenizer splits texts as the teacher's, which has the same tokens.

    Raises:
        UserError: They split a text differently; the message has the first one.
    """
    for text in PROBES:
        ids, expected = (
            each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, reference)
        )
        if ids != expected:
            raise UserError(
                "the tokenizers of student and teacher have the same tokens, but they split "
                f"{text!r} into {len(ids)} and {len(expected)} tokens: set "
                f"tokenizer.model={reference.name_or_path} to give the student the teacher's, or "
                "take two models with one tokenizer"
            )


def same_template(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write a conversation alike, or one has no chat template."""
    if not (tokenizer.chat_template and other.chat_template):
        return True
    if tokenizer.chat_template == other.chat_template:
        return True
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    try:
        written = [each.apply_chat_template(turns, tokenize=False) for each in (tokenizer, other)]
    except (TemplateError, ValueError):  # one of them refuses it
        return False
    return written[0] == written[1]


def check_start(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Check that texts do not begin with the token that is put before each of them.

    Raises:
        UserError: A text does, and would begin with two.
    """
    start = tokenizer.bos_token or tokenizer.eos_token
    text = next((text for text in texts if start and text.startswith(start)), None)
    if text is not None:
        raise UserError(
            f"a text begins with {start} ({text[:MAX_CHARACTERS]!r}), but this token is put before "
            "each text: remove it from the texts, or give the turns as messages"
        )


def _same_ids(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Sequence[str]
) -> bool:
    lists = [list(texts), list(reversed(texts))]
    encoded = (
        [each(*lists[:count], verbose=False)["input_ids"] for count in (1, 2)]
        for each in (tokenizer, other)
    )
    return next(encoded) == next(encoded)


def added_tokens(
    larger: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase
) -> list[str] | None:
    """The tokens that were added to `larger` alone.

    Returns:
        Tokens in the order of their ids; None if the tokenizers differ in another way.
    """
    tokens, shared = larger.get_vocab(), smaller.get_vocab()
    surplus = tokens.keys() - shared.keys()
    roles = {*larger.special_tokens_map.values()}  # of the end of a text, of padding, ...
    if surplus - larger.get_added_vocab().keys() or surplus & roles:
        return None
    if any(tokens.get(token) != i for token, i in shared.items()):
        return None
    return sorted(surplus, key=tokens.__getitem__)


def check_unused(
    larger: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, texts: Iterable[str]
) -> None:
    """Check that texts have the same ids for two tokenizers, of which one has added tokens.

    Raises:
        UserError: A text holds an added token, or is split differently.
    """
    surplus = added_tokens(larger, smaller) or []
    names = ", ".join(surplus[:MAX_SHOWN]) + (", ..." if len(surplus) > MAX_SHOWN else "")
    pattern = re.compile("|".join(map(re.escape, surplus)))
    compared: list[str] = []
    for text in texts:
        match = pattern.search(text)
        if match:
            raise UserError(
                f"a text holds {match[0]}, but only one of teacher and student has this token, and "
                "both must read the same ids: remove it from the texts, or take two models with "
                "one tokenizer"
            )
        if len(compared) < COMPARED_TEXTS:
            compared.append(text)
    probes = [text for text in PROBES if not pattern.search(text)]
    if not _same_ids(larger, smaller, [*probes, *compared]):
        raise UserError(
            f"the tokenizers of teacher and student differ only in {names}, but they split the "
            "texts differently, and both must read the same ids: take two models with one tokenizer"
        )
    log.info(
        "only one of teacher and student has the tokens %s, which no text holds: "
        "the student ships without them",
        names,
    )
