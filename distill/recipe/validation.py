"""Checks of single values; their messages name the key, the value, the rule and a way out."""

import math

from distill.errors import UserError

__all__ = ["check_choice", "check_positive", "check_range"]


def check_range(key: str, value: float | None, low: float, high: float, hint: str) -> None:
    """Raise UserError unless `value` is None or a finite number in [low, high]."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        unbounded = high == math.inf
        limits = f"must be at least {low:g}" if unbounded else f"must lie in [{low:g}, {high:g}]"
        raise UserError(f"{key} is {value:g}, but it {limits}: {hint}")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of the choices."""
    if value not in choices:
        raise UserError(
            f"{key} is {value}, but it must be one of {', '.join(choices)}: choose one of them"
        )


def check_positive(key: str, value: float | None, hint: str) -> None:
    """Raise UserError unless `value` is None or a finite number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{key} is {value:g}, but it must be a number above 0: {hint}")
