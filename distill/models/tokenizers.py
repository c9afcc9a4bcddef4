"""A name -> its tokenizer; or texts -> a small tokenizer of their own."""

import logging
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.models.loading import resolve_path, silence_transformers, translate_errors
from distill.models.preflight import check_tokens
from distill.recipe.config import Run
from distill.tasks.base import Task

log = logging.getLogger("distill")

# An end token of another name, or none, and AutoTokenizer would add this one beyond the vocabulary next to a Qwen 2 model.
LANGUAGE = {"pad_token": "<|padding|>", "eos_token": "<|endoftext|>"}
CLASSIFICATION = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "eos_token": "<|endoftext|>",
}


def build_tokenizer(run: Run, task: Task, train: Dataset) -> PreTrainedTokenizerBase:
    """The one tokenizer of a run, whose ids every named model must read: trained on the training texts, named, or a model's own."""
    named = {
        "tokenizer": run.tokenizer.model,
        "teacher": run.teacher.model if run.teacher else None,
        "student": run.student.model,
    }
    names = {what: name for what, name in named.items() if name is not None}
    if run.tokenizer.vocab_size is not None:
        texts = (text for column in run.data.text for text in train[column] if text)
        chosen: PreTrainedTokenizerBase = train_tokenizer(
            texts, run.tokenizer.vocab_size, task.auto_class != "AutoModelForCausalLM"
        )
    elif names:
        what = next(iter(names))
        chosen = load_tokenizer(names.pop(what), f"{what}.model")
    else:
        raise UserError(
            "the recipe has no tokenizer, but models made from a config bring none: set tokenizer.vocab_size or model"
        )
    for what, name in names.items():
        check_tokens(load_tokenizer(name, f"{what}.model"), chosen, (what, "tokenizer"))
    return chosen


def load_tokenizer(name: str, key: str = "tokenizer.model") -> PreTrainedTokenizerBase:
    """The tokenizer of that Hub name, folder or package; one without a padding token pads with its end-of-text token."""
    where = resolve_path(name, key)
    local = Path(where).is_dir()
    with translate_errors(name, key, local), silence_transformers(bars=local):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # what transformers makes of a folder that has a config only
        raise UserError(
            f"{key} is {name}, but there is no tokenizer in it: save one there, or set tokenizer.model to another folder"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{key} is {name}, but its tokenizer can neither pad nor end a text: set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
        log.info("tokenizer: it has no padding token, so %s pads", tokenizer.eos_token)
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, classification: bool, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most that many tokens. The same texts give the same bytes of tokenizer.json.

    For classification a text is wrapped as [CLS] text [SEP], a pair as [CLS] text [SEP] text [SEP]. For language models
    nothing is added to a text, and decoding gives back what was encoded.
    """
    special = CLASSIFICATION if classification else LANGUAGE
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if classification:
        backend.post_processor = _wrapped(backend)
    if backend.get_vocab_size() < vocab_size:
        log.info(
            "tokenizer: the texts give %d tokens, fewer than the %d asked for",
            backend.get_vocab_size(),
            vocab_size,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **special,
    )


def _wrapped(backend: Tokenizer) -> processors.TemplateProcessing:
    marks = [CLASSIFICATION["cls_token"], CLASSIFICATION["sep_token"]]
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(mark, backend.token_to_id(mark)) for mark in marks],
    )
