"""Load or train the tokenizers of a run."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.models.hub import resolve_path, silence_transformers, translate_errors
from distill.models.vocabulary import (
    added_tokens,
    check_splits,
    check_vocabulary,
    encode_alike,
    same_template,
)
from distill.tasks.base import Task
from distill.tasks.special_tokens import CLASSIFICATION_TOKENS

log = logging.getLogger("distill")


class Tokenizers(NamedTuple):
    """The tokenizers of a run."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | None = None  # None: the teacher reads the student's ids
    spans: bool = False  # whether both predict tokens, and different ones


def build_tokenizers(
    vocab_size: int | None,
    named: Mapping[str, str | None],
    task: Task,
    texts: Iterable[str],
    shared: bool = False,
    spans: bool = False,
) -> Tokenizers:
    """Load or train the tokenizers of a run.

    Args:
        vocab_size: Tokens of a tokenizer to train on `texts`; None loads those that are named.
        named: Names of `tokenizer`, `teacher` and `student`; None for a role without a name.
        task: Decides whether two vocabularies may differ, and the special tokens of a trained one.
        texts: The training texts; read only to train a tokenizer.
        shared: Whether the student has the teacher's embeddings, and so its ids.
        spans: Whether the loss compares models that predict different tokens.

    Raises:
        UserError: There is no tokenizer, or two models must share one and do not.
    """
    names = {role: name for role, name in named.items() if name is not None}
    loaded: dict[str, PreTrainedTokenizerBase] = {}
    if vocab_size is not None:
        loaded["tokenizer"] = train_tokenizer(texts, vocab_size, task.special_tokens())
    loaded |= {role: load_tokenizer(name, f"{role}.model") for role, name in names.items()}
    if not loaded:
        raise UserError(
            "the recipe has no tokenizer, but models built from a config have none: "
            "set tokenizer.vocab_size or tokenizer.model"
        )
    chosen, teacher, student = (loaded.get(role) for role in ("tokenizer", "teacher", "student"))
    if chosen is not None and student is not None:
        check_vocabulary(student, chosen, ("student", "tokenizer"))
    if chosen is not None and teacher is not None and shared:
        check_vocabulary(teacher, chosen, ("teacher", "tokenizer"))
    first = chosen or teacher or student
    assert first is not None
    if teacher is None or (chosen or student) is None or shared:
        return Tokenizers(first)
    return pair_tokenizers(chosen or student, teacher, task, first, spans)


def pair_tokenizers(
    student: Any,
    teacher: PreTrainedTokenizerBase,
    task: Task,
    first: Any,
    spans: bool = False,
) -> Tokenizers:
    """The tokenizers of two models.

    Args:
        student: The student's.
        teacher: The teacher's.
        task: Models that predict tokens must share them, up to tokens that were added to one.
        first: The one that encodes the examples if both encode alike.
        spans: Whether models may predict different tokens.

    Returns:
        Both where they differ. If the models predict tokens, `student` is then the one with fewer.

    Raises:
        UserError: The models predict tokens, and their vocabularies differ, or split texts
            differently.
    """
    if task.predicts_tokens and not same_template(student, teacher):
        log.warning(
            "the chat templates of student and teacher differ: the examples have that of %s, in "
            "which the teacher answers best if it is its own",
            first.name_or_path,
        )
    if encode_alike(student, teacher):
        return Tokenizers(first)
    if spans or not task.predicts_tokens:
        log.info(
            "teacher and student have different tokenizers, of %d and %d tokens: "
            "each text is encoded twice",
            len(teacher),
            len(student),
        )
        return Tokenizers(student, teacher, task.predicts_tokens)
    smaller, larger = sorted((student, teacher), key=len)
    surplus = added_tokens(larger, smaller)
    if surplus is None:
        check_vocabulary(student, teacher)
    if surplus:
        return Tokenizers(smaller, larger)
    check_splits(student, teacher)
    return Tokenizers(first)


def load_tokenizer(name: str, key: str = "tokenizer.model") -> PreTrainedTokenizerBase:
    """Load a tokenizer. One without a padding token pads with its end-of-text token.

    Args:
        name: A folder, `package:<distribution>/<folder>` or a name on the Hub.
        key: The recipe's key of that name.

    Raises:
        UserError: The tokenizer does not exist, or cannot pad.
    """
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    with translate_errors(name, key, local), silence_transformers():
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    # From a folder with only a config, transformers builds a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{key} is {name}, but it has no tokenizer: "
            "save one there, or set tokenizer.model to another folder"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{key} is {name}, but its tokenizer has neither a padding nor an end-of-text "
                "token: set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer has no padding token: %s is used", tokenizer.eos_token)
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Mapping[str, str] = CLASSIFICATION_TOKENS,
    max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.json.

    With special tokens `cls_token` and `sep_token`, a text is wrapped as [CLS] text [SEP], a pair
    as [CLS] text [SEP] text [SEP]. Without them nothing is added to a text, and decoding returns
    the encoded text.

    Args:
        texts: Training texts.
        vocab_size: Largest number of tokens, special ones included.
        special_tokens: Name in transformers -> token; `pad_token` is required.
        max_length: `model_max_length` of the tokenizer, tokens.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if {"cls_token", "sep_token"} <= special_tokens.keys():
        backend.post_processor = _template(
            backend, special_tokens["cls_token"], special_tokens["sep_token"]
        )
    if backend.get_vocab_size() < vocab_size:
        log.info(
            "the tokenizer has %d tokens, fewer than tokenizer.vocab_size, %d: "
            "the texts have no more merges",
            backend.get_vocab_size(),
            vocab_size,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **special_tokens,
    )


def _template(backend: Tokenizer, cls: str, sep: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
