"""Grids of parameters, of which the default tests run a sample."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(
    rows: Iterable[Any], every: int = 4, always: Iterable[Any] = (), rest: str = "long"
) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, with marks for those outside the sample.

    Args:
        rows: All parameters of the grid.
        every: The sample is each row whose index is a multiple of it.
        always: Rows that are in the sample too.
        rest: The mark of the others: `long`, or `slow` where all of them take a minute or two.
    """
    always = list(always)
    return [
        row if index % every == 0 or row in always else _marked(row, rest)
        for index, row in enumerate(rows)
    ]


def _marked(row: Any, mark: str) -> Any:
    marks = [getattr(pytest.mark, name) for name in {"slow", mark}]
    return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=marks)
