"""A tokenizer and the ids to keep -> a tokenizer with fewer tokens, and a model with their rows.

The order of ids is preserved. A text that the original tokenizer splits into kept tokens only is
split into the same tokens by the trimmed one. Other texts fall back to smaller pieces, down to
single characters or bytes, which are never removed.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.generation_settings import renumber_generation, renumber_ids

__all__ = [
    "check_supported",
    "ids_to_keep",
    "is_trimmed_vocabulary",
    "trim_embeddings",
    "trim_tokenizer",
]

FILE = "tokenizer.json"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # byte tokens of tokenizers with byte fallback

_Model = dict[str, Any]  # the section "model" of tokenizer.json


def ids_to_keep(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[int]:
    """The ids that a trimmed tokenizer needs.

    Args:
        tokenizer: the tokenizer to trim.
        ids: ids of the tokens to keep.

    Returns:
        These ids, those of special and added tokens, and those of all tokens that these are built
        from, in ascending order.
    """
    state = _state(tokenizer)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    kept_tokens = {tokens[i] for i in ids if i in tokens}
    kept_tokens |= {added["content"] for added in state["added_tokens"]}
    kept_tokens |= set(tokenizer.all_special_tokens)
    kept_tokens |= _REQUIRED[state["model"]["type"]](state["model"], kept_tokens)
    return sorted(i for i, token in tokens.items() if token in kept_tokens)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> PreTrainedTokenizerBase:
    """Build a tokenizer with these tokens only, renumbered from 0.

    Args:
        tokenizer: the original tokenizer; not modified.
        ids: from :func:`ids_to_keep`.
    """
    new_ids = {old: new for new, old in enumerate(ids)}
    state = _state(tokenizer)
    state["model"] = _TRIMMED_MODEL[state["model"]["type"]](state["model"], new_ids)
    state["added_tokens"] = [
        added | {"id": new_ids[added["id"]]} for added in state["added_tokens"]
    ]
    state["post_processor"] = _renumber(state["post_processor"], new_ids)
    state |= {"padding": None, "truncation": None}  # left from the last call
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / FILE).write_text(json.dumps(state, ensure_ascii=False))
        trimmed: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    expected = {token: new_ids[i] for token, i in tokenizer.get_vocab().items() if i in new_ids}
    assert trimmed.get_vocab() == expected
    return trimmed


def trim_embeddings(model: PreTrainedModel, ids: list[int]) -> None:
    """Keep these rows of the input embeddings, in this order, and renumber the ids in the config.

    Args:
        model: changed in place.
        ids: from :func:`ids_to_keep`.
    """
    config, new_ids = model.config, {old: new for new, old in enumerate(ids)}
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    weight_VD = embedding.weight.detach()
    rows = torch.tensor(ids, device=weight_VD.device)
    embedding.weight = nn.Parameter(weight_VD[rows], embedding.weight.requires_grad)
    embedding.num_embeddings = config.vocab_size = len(ids)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_ids.get(embedding.padding_idx)
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and value is not None:
            setattr(config, key, renumber_ids(value, new_ids))
    if model.can_generate():
        renumber_generation(model.generation_config, new_ids)


def is_trimmed_vocabulary(vocabulary: Mapping[str, int], original: Mapping[str, int]) -> bool:
    """Whether a vocabulary is a subset of another one, with ids in the same order."""
    if not vocabulary.keys() <= original.keys():
        return False
    old_ids = [original[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    return old_ids == sorted(old_ids)


def check_supported(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can be trimmed.

    Raises:
        UserError: if it is slow, or its model is not WordPiece, BPE or Unigram.
    """
    _state(tokenizer)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__}, but only fast ones can be trimmed: "
            "leave TrimVocabulary out"
        )
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind not in _REQUIRED:
        choices = ", ".join(_REQUIRED)
        raise UserError(
            f"the tokenizer is a {kind}, but only {choices} can be trimmed: "
            "leave TrimVocabulary out"
        )
    return state


def _required_by_wordpiece(model: _Model, kept_tokens: set[str]) -> set[str]:
    """Single characters, and the unknown token.

    WordPiece takes the longest piece that fits: if it is kept, it is still the longest. A word is
    unknown if one of its characters is in no piece.
    """
    prefix = model["continuing_subword_prefix"]
    characters = {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1}
    return characters | {model["unk_token"]}


def _required_by_bpe(model: _Model, kept_tokens: set[str]) -> set[str]:
    """Single characters and bytes, and all tokens from which a kept token can be merged.

    The order of merges is preserved, so that the same merge applies first.
    """
    merges: dict[str, list[tuple[str, str]]] = {}
    for left, right in model["merges"]:
        merges.setdefault(_merge(model, left, right), []).append((left, right))
    required, pending = set(), list(kept_tokens)
    while pending:
        for part in (part for pair in merges.get(pending.pop(), ()) for part in pair):
            if part not in required:
                required.add(part)
                pending.append(part)
    return required | _single(model, model["vocab"]) | ({model["unk_token"]} - {None})


def _required_by_unigram(model: _Model, kept_tokens: set[str]) -> set[str]:
    """Single characters and bytes, the unknown piece, and the least likely piece.

    Unknown characters are scored by the least likely piece. The most likely path through kept
    pieces stays the most likely, since no path is added.
    """
    pieces = [piece for piece, _ in model["vocab"]]
    least = min(model["vocab"], key=lambda entry: entry[1])[0]
    unknown = {pieces[model["unk_id"]]} if model["unk_id"] is not None else set()
    return _single(model, pieces) | unknown | {least}


def _single(model: _Model, tokens: Iterable[str]) -> set[str]:
    """Tokens of one byte, or of one character apart from the marks of parts of words."""
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    bare = {token: token.removeprefix(prefix).removesuffix(suffix) for token in tokens}
    return {token for token, text in bare.items() if len(text) == 1 or _BYTE_TOKEN.fullmatch(token)}


def _merge(model: _Model, left: str, right: str) -> str:
    return left + right.removeprefix(model["continuing_subword_prefix"] or "")


def _trim_wordpiece(model: _Model, new_ids: Mapping[int, int]) -> _Model:
    vocab = {token: new_ids[i] for token, i in model["vocab"].items() if i in new_ids}
    return model | {"vocab": vocab}


def _trim_bpe(model: _Model, new_ids: Mapping[int, int]) -> _Model:
    trimmed = _trim_wordpiece(model, new_ids)
    tokens = trimmed["vocab"].keys()
    merges = [pair for pair in model["merges"] if {*pair, _merge(model, *pair)} <= tokens]
    return trimmed | {"merges": merges}


def _trim_unigram(model: _Model, new_ids: Mapping[int, int]) -> _Model:
    vocab = [entry for i, entry in enumerate(model["vocab"]) if i in new_ids]
    unknown = new_ids[model["unk_id"]] if model["unk_id"] is not None else None
    return model | {"vocab": vocab, "unk_id": unknown}


# Type of the tokenizer's model -> the tokens that must not be removed, and the trimmed model.
_REQUIRED: Mapping[str, Callable[[_Model, set[str]], set[str]]] = {
    "WordPiece": _required_by_wordpiece,
    "BPE": _required_by_bpe,
    "Unigram": _required_by_unigram,
}
_TRIMMED_MODEL: Mapping[str, Callable[[_Model, Mapping[int, int]], _Model]] = {
    "WordPiece": _trim_wordpiece,
    "BPE": _trim_bpe,
    "Unigram": _trim_unigram,
}


def _renumber(part: Any, new_ids: Mapping[int, int]) -> Any:
    """The post-processor (it adds special tokens) with new ids."""
    if isinstance(part, list):
        return [_renumber(inner, new_ids) for inner in part]
    if not isinstance(part, dict):
        return part
    renumbered = {key: _renumber(value, new_ids) for key, value in part.items()}
    for key in ("sep", "cls"):  # [token, id], in those of BERT and RoBERTa
        if isinstance(part.get(key), list):
            renumbered[key] = [part[key][0], new_ids[part[key][1]]]
    if "ids" in part:  # in a template
        renumbered["ids"] = [new_ids[i] for i in part["ids"]]
    return renumbered
