"""Load or train the tokenizer of a run."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.models.hub import resolve_path, silence_transformers, translate_errors
from distill.models.preflight import check_vocabulary
from distill.tasks.base import Task
from distill.tasks.special_tokens import CLASSIFICATION_TOKENS

log = logging.getLogger("distill")


def build_tokenizer(
    vocab_size: int | None, named: Mapping[str, str | None], task: Task, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """Load or train the tokenizer of a run, and check that all named models have its vocabulary.

    Args:
        vocab_size: Tokens of a tokenizer to train on `texts`; None loads the first that is named.
        named: Names of `tokenizer`, `teacher` and `student`, in this order; None for a role without
            a name.
        task: Decides the special tokens of a trained tokenizer.
        texts: The training texts; read only to train a tokenizer.

    Raises:
        UserError: There is no tokenizer, or a named model has another vocabulary.
    """
    names = {role: name for role, name in named.items() if name is not None}
    tokenizer: PreTrainedTokenizerBase
    if vocab_size is not None:
        tokenizer = train_tokenizer(texts, vocab_size, task.special_tokens())
    elif names:
        role = next(iter(names))
        tokenizer = load_tokenizer(names.pop(role), f"{role}.model")
    else:
        raise UserError(
            "the recipe has no tokenizer, but models built from a config have none: "
            "set tokenizer.vocab_size or tokenizer.model"
        )
    for role, name in names.items():
        check_vocabulary(load_tokenizer(name, f"{role}.model"), tokenizer, (role, "tokenizer"))
    return tokenizer


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
    with translate_errors(name, key, local), silence_transformers(bars=local):
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
