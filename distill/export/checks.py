"""What every export must be: equal and smaller. Where it is not, one sentence says so, and nothing is exported."""

import sys
from pathlib import Path
from typing import Any

from distill import evaluate
from distill.errors import RunFailed
from distill.evaluate.cost import disk_bytes, weight_bytes
from distill.recipe import config


def check_equal(
    agreement: float,
    difference: float,
    needed: float,
    tolerance: float | None,
    folder: Path,
    way_out: str = "",
) -> None:
    if agreement < needed or not difference <= (
        tolerance or sys.float_info.max
    ):  # NaN is no difference to accept
        found = f"{agreement:.2%} of its predictions are the student's, and logits differ by up to {difference:.2g}"
        rule = f"{needed:.0%} must be the same" + (
            "" if tolerance is None else f" and the difference at most {tolerance:.2g}"
        )
        raise failed("equal", found, rule + (f": {way_out}" if way_out else ""), folder)


def smaller(run: config.Run, folder: Path, draft: Path, files: str | None = None) -> dict[str, Any]:
    """Bytes on disk, beside the teacher's. The weights decide: a shorter config alone makes no smaller model. `files` holds them."""
    if run.teacher is None:
        return {"bytes": disk_bytes(draft), "teacher_bytes": None, "ratio": None}
    from distill import models

    teacher = models.local_files(evaluate.of_run(run, folder)["teacher"], "teacher.model")
    size, limit = disk_bytes(draft, files) if files else weight_bytes(draft), weight_bytes(teacher)
    if size >= limit:
        rule = f"its teacher's take {limit:,}: keep fewer layers, or set export.format=packed or a smaller export.dtype"
        raise failed("smaller", f"its weights take {size:,} bytes on disk", rule, folder)
    size, limit = disk_bytes(draft), disk_bytes(teacher)
    return {"bytes": size, "teacher_bytes": limit, "ratio": size / limit}


def failed(law: str, found: str, rule: str, folder: Path) -> RunFailed:
    return RunFailed(
        f"the export is not {law}: {found}, but {rule}; nothing was exported, and the student is kept in {folder / 'student'}"
    )
