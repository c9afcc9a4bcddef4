"""Classes and functions for test_targets to find by their dotted paths."""

from dataclasses import dataclass
from typing import Any

from distill.recipe.config import Loss as Loss


class Plain:
    def __init__(self, first: int, *, second: int = 2) -> None: ...


class Inherits(Plain):
    pass


@dataclass
class Fields:
    size: int
    name: str = ""


class Anything:
    def __init__(self, **options: Any) -> None: ...


def function(x: int, y: int) -> None: ...
