"""Lines of the table of metrics.json, and how numbers are shown in them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from distill.evaluate.record_parts import Interval


class Row(NamedTuple):
    """One line: the value of each model, empty where there is none, and student / teacher."""

    group: str
    name: str
    teacher: str
    dense: str
    student: str
    ratio: str


def metric_row(group: str, name: str, values: Sequence[Interval | None]) -> Row:
    """The line of a metric: those of teacher, dense and student, and their ratio."""
    teacher, dense, student = values
    return Row(
        group,
        name.replace("_", " "),
        format_interval(teacher),
        format_interval(dense),
        format_interval(student),
        format_ratio(student and student.value, teacher and teacher.value),
    )


def format_number(value: float | None) -> str:
    """Three or four significant digits; empty where there is no value."""
    if value is None or not math.isfinite(value):
        return ""
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def format_interval(interval: Interval | None) -> str:
    """The value, with its interval if it has one."""
    if interval is None:
        return ""
    value, low, high = map(format_number, interval)
    return f"{value} [{low}, {high}]" if low and high else value


def format_ratio(value: float | None, reference: float | None) -> str:
    if value is None or reference is None or not (reference > 0 and value >= 0):
        return ""
    return f"{value / reference:.2f}x"
