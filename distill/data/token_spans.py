"""Tokens of two tokenizers -> spans of the same bytes.

Both sequences end with the same text, so that they are compared from their ends: one of them may
begin later, where the other has a token that starts texts.

N = tokens of the student, M = tokens of the teacher.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor

from distill.errors import UserError
from distill.losses import IGNORED

log = logging.getLogger("distill")

COLUMN = "spans"  # the span of each predicted token of an example
NONE = -1  # the span of a token that belongs to none


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The span of each token, (N,) and (M,), numbered from the first; -1: none.

    A span has at least one token of both, and the same bytes in both. A special token has no bytes:
    two at the end are a span of their own, others join the tokens before them.

    Returns:
        All -1 where the texts differ, as those of a tokenizer that normalizes them do.
    """
    spans = np.full(len(student), NONE), np.full(len(teacher), NONE)
    if not _same_end(b"".join(student), b"".join(teacher)):
        return spans
    groups = _groups([len(each) for each in student], [len(each) for each in teacher])
    for number, edges in enumerate(reversed(groups)):
        for side, (start, end) in zip(spans, edges, strict=True):
            side[start:end] = number
    return spans


def _same_end(one: bytes, other: bytes) -> bool:
    size = min(len(one), len(other))
    return one[len(one) - size :] == other[len(other) - size :]


def _groups(student: list[int], teacher: list[int]) -> list[tuple[tuple[int, int], ...]]:
    """The (start, end) of each span in both sequences, from the last span to the first.

    Args:
        student: Bytes of each token.
        teacher: The same of the other sequence.
    """
    groups: list[tuple[tuple[int, int], ...]] = []
    sides = (student, teacher)
    ends = [len(student), len(teacher)]
    while min(ends) > 0:
        starts = [end - 1 for end in ends]
        sizes = [side[start] for side, start in zip(sides, starts, strict=True)]
        while sizes[0] != sizes[1]:
            shorter = int(sizes[1] < sizes[0])
            if starts[shorter] == 0:  # the other sequence begins earlier
                return groups
            starts[shorter] -= 1
            sizes[shorter] += sides[shorter][starts[shorter]]
        groups.append(tuple(zip(starts, ends, strict=True)))
        ends = starts
    return groups


def collate(examples: Sequence[dict[str, Any]]) -> Tensor | None:
    """The spans of a batch's rows, numbered from the first example to the last; None without."""
    if COLUMN not in examples[0]:
        return None
    columns, count = [], 0
    for example in examples:
        spans = np.asarray(example[COLUMN])
        columns.append(np.where(spans == NONE, NONE, spans + count))
        count += int(spans.max(initial=NONE)) + 1
    return torch.from_numpy(np.concatenate(columns))


# ---- the examples of a split


def check_windows(teacher: Dataset, student: Dataset, name: str, max_length: int) -> None:
    """UserError if a text does not fit into one example for both tokenizers."""
    single = all(
        np.all(split.with_format("numpy")["first_window"][:]) for split in (teacher, student)
    )
    if len(teacher) != len(student) or not single:
        raise UserError(
            f"task.max_length is {max_length}, but texts of the {name} split are longer for one of "
            "the tokenizers, and models of different tokenizers are compared text by text: raise "
            "task.max_length, or shorten the texts"
        )


def with_spans(
    pair: tuple[Dataset, Dataset], tables: tuple[list[bytes], list[bytes]]
) -> tuple[Dataset, Dataset]:
    """The examples of student and teacher with the span of each predicted token.

    Args:
        pair: The same texts, as each tokenizer encodes them.
        tables: The bytes of each token of both.

    Raises:
        UserError: No text has a span.
    """
    columns: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for tokens in zip(*(_predicted(*each) for each in zip(pair, tables, strict=True)), strict=True):
        for column, spans in zip(columns, align(*tokens), strict=True):
            column.append(spans)
    joined = [np.concatenate(column) for column in columns]
    if joined[0].max(initial=NONE) == NONE:
        raise UserError(
            "teacher and student have different tokenizers, and no predicted token of one has the "
            "bytes of tokens of the other: take two models whose tokenizers keep the texts"
        )
    shares = [100 * float(np.mean(each != NONE)) for each in joined]
    count = sum(int(spans.max(initial=NONE)) + 1 for spans in columns[0])
    log.info(
        "teacher and student are compared over %d spans of the same bytes, which hold %.1f %% of "
        "the student's predicted tokens and %.1f %% of the teacher's",
        *(count, *shares),
    )
    return tuple(
        split.add_column(COLUMN, [each.tolist() for each in column], feature=List(Value("int64")))
        for split, column in zip(pair, columns, strict=True)
    )


def _predicted(split: Dataset, table: list[bytes]) -> Iterator[list[bytes]]:
    """The bytes of the predicted tokens of each example."""
    for example in split:
        labels = example["labels"][1:]  # the first token has no row
        yield [table[label] for label in labels if label != IGNORED]
