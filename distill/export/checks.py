"""Requirements of every export: loadable, equal to the student, smaller than the teacher."""

import sys
from pathlib import Path
from typing import NamedTuple

from distill.errors import RunFailed
from distill.evaluate.cost import disk_bytes, weight_bytes


class Tolerance(NamedTuple):
    """How close an export must be to the student."""

    agreement: float  # least share of rows with the same prediction
    difference: float | None  # largest difference of a logit; None: any
    way_out: str = ""  # what the user can do otherwise


class Sizes(NamedTuple):
    """Bytes on disk, of all files."""

    bytes: int
    teacher_bytes: int | None
    ratio: float | None


def check_equal(agreement: float, difference: float, tolerance: Tolerance, student: Path) -> None:
    """Raise RunFailed if an export is not close enough to the student; NaN never is."""
    limit = tolerance.difference or sys.float_info.max
    if agreement >= tolerance.agreement and difference <= limit:
        return
    rule = f"{tolerance.agreement:.0%} must be the same"
    if tolerance.difference is not None:
        rule += f" and the difference at most {tolerance.difference:.2g}"
    raise export_failed(
        "equal",
        f"{agreement:.2%} of its predictions are the student's, and logits differ by up to "
        f"{difference:.2g}",
        rule + (f": {tolerance.way_out}" if tolerance.way_out else ""),
        student,
    )


def check_smaller(
    draft: Path,
    teacher: Path | None,
    student: Path,
    weight_files: str | None = None,
    smaller: bool = True,
) -> Sizes:
    """Raise RunFailed unless the weights take fewer bytes than the teacher's; return the sizes.

    Only weights are compared, because a shorter config makes no smaller model. `weight_files` is
    the pattern of a runtime's files; without `smaller`, any size is accepted.
    """
    if teacher is None:
        return Sizes(disk_bytes(draft), None, None)
    size = disk_bytes(draft, weight_files) if weight_files else weight_bytes(draft)
    limit = weight_bytes(teacher)
    if smaller and size >= limit:
        raise export_failed(
            "smaller",
            f"its weights take {size:,} bytes on disk",
            f"its teacher's take {limit:,}: set export.smaller=false to allow it, keep fewer "
            "layers, or set export.format=packed or a smaller export.dtype",
            student,
        )
    size, limit = disk_bytes(draft), disk_bytes(teacher)
    return Sizes(size, limit, size / limit)


def export_failed(requirement: str, finding: str, rule: str, student: Path) -> RunFailed:
    """The error for an export that does not meet a requirement."""
    return RunFailed(
        f"the export is not {requirement}: {finding}, but {rule}; nothing was exported, and the "
        f"student is kept in {student}"
    )
