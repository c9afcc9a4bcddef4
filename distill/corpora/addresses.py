"""Addresses in the United States and their parts, as conversations whose replies have a score.

`addresses.tsv.gz` holds the labeled addresses of the package usaddress 0.5.16 (MIT,
`addresses.LICENSE`): a line for each, of labels that are followed by their words.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

FILE = Path(__file__).with_name("addresses.tsv.gz")
REQUEST = "Write the parts of this address as a JSON object: "
TENTHS = {"test": 2, "validation": 1}  # of the addresses, chosen by their hash
MARKS = " ,;"  # between parts


def addresses() -> DatasetDict:
    """Requests to split an address, with a JSON object of its parts as the reply, in `messages`.

    An address is in the same split in every version of the corpus. Those in which a part occurs
    twice are left out, as an object cannot hold it.
    """
    splits: dict[str, list[list[dict[str, str]]]] = {"train": [], "validation": [], "test": []}
    for address, parts in _labeled():
        splits[_split_of(address)].append(
            [
                {"role": "user", "content": REQUEST + address},
                {"role": "assistant", "content": json.dumps(parts, ensure_ascii=False)},
            ]
        )
    return DatasetDict(
        {name: Dataset.from_dict({"messages": rows}) for name, rows in splits.items()}
    )


def _labeled() -> Iterator[tuple[str, dict[str, str]]]:
    """Each address once, with its parts by label."""
    seen = set()
    for line in gzip.decompress(FILE.read_bytes()).decode().splitlines():
        labels, texts = line.split("\t")[::2], line.split("\t")[1::2]
        address = " ".join(texts)
        if len(set(labels)) == len(labels) and address not in seen:
            seen.add(address)
            cleaned = (text.strip(MARKS) for text in texts)
            yield address, dict(zip(labels, cleaned, strict=True))


def _split_of(address: str) -> str:
    place = int(hashlib.sha256(address.encode()).hexdigest(), 16) % 10
    for name, tenths in TENTHS.items():
        if place < tenths:
            return name
        place -= tenths
    return "train"
