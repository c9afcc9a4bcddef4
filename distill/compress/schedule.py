"""The share of a technique's target that is applied at each training step."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distill.errors import UserError

__all__ = ["SHAPES", "Duration", "Schedule", "parse_duration"]

log = logging.getLogger(__name__)

# Share of the time between start and end -> share of the target; maps 0 to 0 and 1 to 1.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "cubic": lambda passed: 1 - (1 - passed) ** 3,  # Zhu & Gupta 2017, equation 1
    "linear": lambda passed: passed,
    "one_shot": lambda passed: 1.0,
}


@dataclass(frozen=True)
class Duration:
    """A share of the optimizer steps of a run, in [0, 1], or a number of steps."""

    value: float
    in_steps: bool = False

    def steps(self, total: int) -> int:
        """The number of steps in a run of `total` optimizer steps."""
        return int(self.value) if self.in_steps else round(self.value * total)

    def __str__(self) -> str:
        return f"{self.value:g} steps" if self.in_steps else f"{self.value:g}"


def parse_duration(key: str, value: float | str) -> Duration:
    """Parse a duration of a recipe: a share of the training, or a number of steps.

    Args:
        key: key in the recipe, for messages.
        value: a number in [0, 1], or text such as ``"500 steps"``. A number above 1 is deprecated:
            it is read as steps, with a warning.

    Raises:
        UserError: if `value` has another form.

    Example:
        >>> parse_duration("start", 0.2).steps(total=1000)
        200
        >>> parse_duration("start", "500 steps").steps(total=1000)
        500
    """
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+) ?steps?\s*", value)):
        return Duration(int(match[1]), in_steps=True)
    if isinstance(value, int | float) and 0 <= value <= 1:
        return Duration(value)
    if isinstance(value, int | float) and math.isfinite(value) and value > 1 and value % 1 == 0:
        log.warning(
            "%s is %g, which is taken as optimizer steps for now: write %s: %d steps",
            *(key, value, key, value),
        )
        return Duration(value, in_steps=True)
    raise UserError(
        f"{key} is {value}, but it must be a share of the training in [0, 1] or a number of steps: "
        "write 0.5 for halfway, or 500 steps"
    )


class Schedule:
    """Applies a technique gradually, from `start` to `end`.

    Args:
        start: when the technique begins, as a share of the training (0.2) or in optimizer steps
            (``"500 steps"``). At 1.0 it is applied after the last step, without further training.
        end: when it reaches its target; not before `start`.
        shape: ``cubic`` (fast at first), ``linear``, or ``one_shot`` (everything at `start`).

    Raises:
        UserError: if a value is out of range, or `end` is before `start`.
    """

    def __init__(self, start: float | str, end: float | str, shape: str = "cubic") -> None:
        if shape not in SHAPES:
            choices = ", ".join(SHAPES)
            raise UserError(
                f"shape is {shape}, but it must be one of {choices}: choose one of them"
            )
        self.start, self.end = parse_duration("start", start), parse_duration("end", end)
        self.shape = shape
        comparable = shape != "one_shot" and self.start.in_steps == self.end.in_steps
        if comparable and self.end.value < self.start.value:
            raise UserError(
                f"end is {self.end}, but start is {self.start}, and a schedule must not end before "
                "it starts: raise end"
            )

    def first(self, total: int) -> int:
        """The step, of `total`, after which the technique begins."""
        return self.start.steps(total)

    def last(self, total: int) -> int:
        """The step, of `total`, after which its target is reached."""
        return self.first(total) if self.shape == "one_shot" else self.end.steps(total)

    def at(self, step: int, total: int) -> float:
        """The share of the target after `step` of `total` optimizer steps, in [0, 1]."""
        first, last = self.first(total), self.last(total)
        if step < first:
            return 0.0
        return 1.0 if step >= last else SHAPES[self.shape]((step - first) / (last - first))

    def check(self, total: int) -> None:
        """Check that the schedule fits a run of `total` optimizer steps.

        Raises:
            UserError: if it ends after the training, or before it starts.
        """
        first, last = self.first(total), self.last(total)
        if last > total:
            raise UserError(
                f"the schedule ends at step {last}, but the training has {total}: "
                "end it earlier, or train for longer"
            )
        if first > last:
            raise UserError(
                f"the schedule starts at step {first}, but it ends at step {last}: "
                "start it earlier, or end it later"
            )
