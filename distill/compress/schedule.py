"""How far a technique has come at each step of a training: nothing before it starts, all of it from its end on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distill.errors import UserError

# share of the way in time -> share of the target; each hits 0 at 0 and 1 at 1
SHAPES: Mapping[str, Callable[[float], float]] = {
    "cubic": lambda passed: (
        1 - (1 - passed) ** 3
    ),  # fast while there is most to spare (Zhu & Gupta 2017)
    "linear": lambda passed: passed,
    "one_shot": lambda passed: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """`start` and `end` are shares of the training in [0, 1], or above 1 whole numbers of optimizer steps.

    1.0 is the end of training: what starts there is not followed by any repair. `one_shot` does everything at `start`, whatever `end`.
    """

    start: float
    end: float
    shape: str = "cubic"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(
                f"shape is {self.shape}, but it must be one of {', '.join(SHAPES)}: choose one of them"
            )
        for key, value in (("start", self.start), ("end", self.end)):
            if not (
                isinstance(value, int | float)
                and (0 <= value <= 1 or (value > 1 and value == int(value)))
            ):
                raise UserError(
                    f"{key} is {value}, but it must be a share of the training in [0, 1] or a number of steps: 0.5 is halfway"
                )
        if (
            self.shape != "one_shot"
            and (self.start <= 1) == (self.end <= 1)
            and self.end < self.start
        ):
            raise UserError(
                f"end is {self.end:g}, but start is {self.start:g}, and a schedule must not end before it starts: raise end"
            )

    def first(self, total: int) -> int:
        """The step from which on the technique is at work."""
        return _step(self.start, total)

    def last(self, total: int) -> int:
        """The step at which its target is reached."""
        return self.first(total) if self.shape == "one_shot" else _step(self.end, total)

    def at(self, step: int, total: int) -> float:
        """The share of the target after that many of `total` optimizer steps, in [0, 1]."""
        first, last = self.first(total), self.last(total)
        if step < first:
            return 0.0
        return 1.0 if step >= last else SHAPES[self.shape]((step - first) / (last - first))

    def check(self, total: int) -> None:
        """UserError where a training of `total` steps ends before the schedule does."""
        first, last = self.first(total), self.last(total)
        if last > total:
            raise UserError(
                f"the schedule ends at step {last}, but the training has {total}: end it earlier, or train for longer"
            )
        if first > last:
            raise UserError(
                f"the schedule starts at step {first}, but it ends at step {last}: start it earlier, or end it later"
            )


def _step(value: float, total: int) -> int:
    return round(value * total) if value <= 1 else int(value)
