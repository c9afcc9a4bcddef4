"""A tokenizer and the ids to keep -> a tokenizer of fewer tokens, and a model with the rows of these alone.

Ids keep their order. The law: a text that the whole tokenizer writes in kept tokens only is written in the same tokens by the
trimmed one. What else occurs falls back on smaller pieces, down to single characters or bytes, which all stay.
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

FILE = "tokenizer.json"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # of tokenizers that write unknown characters as bytes

Model = dict[str, Any]  # the part "model" of tokenizer.json


def ids_to_keep(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[int]:
    """The ids that stay where these are to stay, in order: with them special and added tokens, and what the law needs."""
    state = _state(tokenizer)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    wanted = {tokens[i] for i in ids if i in tokens}
    wanted |= {added["content"] for added in state["added_tokens"]} | set(
        tokenizer.all_special_tokens
    )
    wanted |= NEEDED[state["model"]["type"]](state["model"], wanted)
    return sorted(i for i, token in tokens.items() if token in wanted)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with these ids of :func:`kept` alone, counted from 0; all else of it is as it was."""
    places = {old: new for new, old in enumerate(ids)}
    state = _state(tokenizer)
    state["model"] = WITHOUT[state["model"]["type"]](state["model"], places)
    state["added_tokens"] = [added | {"id": places[added["id"]]} for added in state["added_tokens"]]
    state["post_processor"] = _renumbered(state["post_processor"], places)
    state |= {"padding": None, "truncation": None}  # how it was last used
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / FILE).write_text(json.dumps(state, ensure_ascii=False))
        made: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    assert made.get_vocab() == {
        token: places[i] for token, i in tokenizer.get_vocab().items() if i in places
    }
    return made


def trim_embeddings(model: PreTrainedModel, ids: list[int]) -> None:
    """Keep these rows of the embeddings, in this order: the model answers the new ids as it answered the old ones."""
    config, places = model.config, {old: new for new, old in enumerate(ids)}
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    weight_VD = embedding.weight.detach()
    embedding.weight = nn.Parameter(
        weight_VD[torch.tensor(ids, device=weight_VD.device)], embedding.weight.requires_grad
    )
    embedding.num_embeddings = config.vocab_size = len(ids)
    if embedding.padding_idx is not None:
        embedding.padding_idx = places.get(embedding.padding_idx)
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and value is not None:
            setattr(
                config,
                key,
                [places[i] for i in value if i in places]
                if isinstance(value, list)
                else places.get(value),
            )


def is_trimmed_vocabulary(ours: Mapping[str, int], whole: Mapping[str, int]) -> bool:
    """Whether a vocabulary is another one trimmed: some of its tokens, in the order of their ids."""
    if not ours.keys() <= whole.keys():
        return False
    old = [whole[token] for token in sorted(ours, key=ours.__getitem__)]
    return old == sorted(old)


def check_supported(tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where the tokenizer is of a kind that cannot be trimmed."""
    _state(tokenizer)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__}, but only fast ones can be trimmed: leave TrimVocabulary out"
        )
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind not in NEEDED:
        raise UserError(
            f"the tokenizer is a {kind}, but only {', '.join(NEEDED)} can be trimmed: leave TrimVocabulary out"
        )
    return state


def _needed_by_word_pieces(model: Model, wanted: set[str]) -> set[str]:
    """Single characters, and the unknown token.

    The longest piece that fits somewhere is kept, so it is still the longest. A word is unknown for a character that no piece has.
    """
    prefix = model["continuing_subword_prefix"]
    return {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1} | {
        model["unk_token"]
    }


def _needed_by_merges(model: Model, wanted: set[str]) -> set[str]:
    """Single characters and bytes, and whatever a wanted token can be merged from.

    All merges on the way to a kept token are kept, in their order, so the first that applies in the whole one is the first here.
    """
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in model["merges"]:
        parts.setdefault(_merged(model, left, right), []).append((left, right))
    needed, todo = set(), list(wanted)
    while todo:
        for part in (part for pair in parts.get(todo.pop(), ()) for part in pair):
            if part not in needed:
                needed.add(part)
                todo.append(part)
    return needed | _single(model, model["vocab"]) | ({model["unk_token"]} - {None})


def _needed_by_unigrams(model: Model, wanted: set[str]) -> set[str]:
    """Single characters and bytes, the unknown piece, and the least likely one, which what is unknown is scored by.

    The likeliest path is still there, and no path is new, so it is still the likeliest.
    """
    pieces = [piece for piece, _ in model["vocab"]]
    least = min(model["vocab"], key=lambda entry: entry[1])[0]
    unknown = {pieces[model["unk_id"]]} if model["unk_id"] is not None else set()
    return _single(model, pieces) | unknown | {least}


def _single(model: Model, tokens: Iterable[str]) -> set[str]:
    """Tokens of one character beside the marks for inside and end of a word, and of one byte."""
    prefix, suffix = (
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix") or "",
    )
    bare = {token: token.removeprefix(prefix).removesuffix(suffix) for token in tokens}
    return {token for token, inner in bare.items() if len(inner) == 1 or BYTE.fullmatch(token)}


def _merged(model: Model, left: str, right: str) -> str:
    return left + right.removeprefix(model["continuing_subword_prefix"] or "")


def _pieces_without(model: Model, places: Mapping[int, int]) -> Model:
    return model | {
        "vocab": {token: places[i] for token, i in model["vocab"].items() if i in places}
    }


def _merges_without(model: Model, places: Mapping[int, int]) -> Model:
    fewer = _pieces_without(model, places)
    known = fewer["vocab"].keys()
    return fewer | {
        "merges": [pair for pair in model["merges"] if {*pair, _merged(model, *pair)} <= known]
    }


def _unigrams_without(model: Model, places: Mapping[int, int]) -> Model:
    unknown = places[model["unk_id"]] if model["unk_id"] is not None else None
    return model | {
        "vocab": [entry for i, entry in enumerate(model["vocab"]) if i in places],
        "unk_id": unknown,
    }


# kind of tokenizer -> what must stay beside the wanted tokens, and its model with fewer of them
NEEDED: Mapping[str, Callable[[Model, set[str]], set[str]]] = {
    "WordPiece": _needed_by_word_pieces,
    "BPE": _needed_by_merges,
    "Unigram": _needed_by_unigrams,
}
WITHOUT: Mapping[str, Callable[[Model, Mapping[int, int]], Model]] = {
    "WordPiece": _pieces_without,
    "BPE": _merges_without,
    "Unigram": _unigrams_without,
}


def _renumbered(part: Any, places: Mapping[int, int]) -> Any:
    """A post-processor, which adds special tokens, with their new ids."""
    if isinstance(part, list):
        return [_renumbered(inner, places) for inner in part]
    if not isinstance(part, dict):
        return part
    renewed = {key: _renumbered(value, places) for key, value in part.items()}
    for key in ("sep", "cls"):  # of BERT's and RoBERTa's: [token, id]
        if isinstance(part.get(key), list):
            renewed[key] = [part[key][0], places[part[key][1]]]
    if "ids" in part:  # of a template's
        renewed["ids"] = [places[i] for i in part["ids"]]
    return renewed
