"""Parts of the records of a measurement: intervals, costs, the machine, generation.

None stands for what was not measured, NaN for what cannot be computed; JSON has only None.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Self

Json = dict[str, Any]


class Interval(NamedTuple):
    """A metric and the ends of its 95 % interval; NaN where one cannot be computed."""

    value: float
    low: float
    high: float

    def to_json(self) -> Json:
        return self._asdict()

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(*(number(values.get(name)) for name in cls._fields))


@dataclass(frozen=True)
class Cost:
    """Time, memory and bytes that a model needs; None if not measured."""

    latency_p50_ms: float | None = None
    latency_p90_ms: float | None = None
    latency_p99_ms: float | None = None
    examples_per_s: float | None = None
    tokens_per_s: float | None = None
    parameters: int | None = None
    weight_bytes: int | None = None  # in memory
    memory_before_bytes: int | None = None  # of the process, before the model was loaded
    memory_loaded_bytes: int | None = None
    memory_peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    disk_bytes: int | None = None
    bits_per_weight: float | None = None  # bits of the weights' files per parameter

    def to_json(self) -> Json:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(**known_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the settings of a measurement of cost."""

    cpu: str
    cores: int | None = None
    ram_bytes: int | None = None
    device: str = "cpu"  # name of the GPU, if there is one
    torch: str
    transformers: str | None = None
    python: str | None = None
    threads: int
    dtype: str = "float32"
    attention: str = "eager"
    warm_up: dict[str, int] = field(default_factory=dict)  # untimed calls, by kind of call
    turn: dict[str, int] = field(default_factory=dict)  # consecutive calls of a model, by kind
    requests: int  # timed single requests
    batches: int  # timed batches

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(**known_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A language model's greedy replies to prompts, and what they cost; None if not measured."""

    stopped: Interval  # share of replies that end with a stop token
    tokens: float  # mean length of a reply, its stop token included
    distinct_1: float  # different tokens per token of all replies (Li et al. 2016)
    distinct_2: float  # the same of pairs of consecutive tokens
    agreement: float | None = None  # share of its tokens that the teacher predicts there too
    divergence: float | None = None  # from the teacher on its replies, in nats per token
    scores: dict[str, Interval] = field(default_factory=dict)  # against the replies in the data
    first_token_ms: float | None = None
    token_ms: float | None = None  # of each token after the first
    tokens_per_s: float | None = None  # of one reply at a time
    batch_tokens_per_s: float | None = None
    cache_bytes_per_token: float | None = None
    memory_peak_bytes: int | None = None
    device_peak_bytes: int | None = None

    def to_json(self) -> Json:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        scores = {name: score.to_json() for name, score in self.scores.items()}
        return values | {"stopped": self.stopped.to_json(), "scores": scores}

    @classmethod
    def from_json(cls, values: Json) -> Self:
        numbers = {
            name: number(value)
            for name, value in values.items()
            if name not in ("stopped", "scores")
        }
        scores = values.get("scores", {}).items()
        return cls(
            stopped=Interval.from_json(values["stopped"]),
            scores={name: Interval.from_json(score) for name, score in scores},
            **known_fields(cls, numbers),
        )


@dataclass(frozen=True)
class Replies:
    """How replies were generated, and some of them."""

    prompts: int
    max_new_tokens: int
    batch: int  # prompts of a timed batch
    examples: list[dict[str, str]]  # `prompt`, `reference`, and each model's reply by its name

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(**known_fields(cls, values))


def replace_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None in nested dictionaries."""
    if isinstance(value, dict):
        return {key: replace_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """A number from JSON, where None stands for NaN."""
    return math.nan if value is None else value


def known_fields(record: type, values: Json) -> Json:
    """The values that the record has fields for; another version may have written others."""
    names = {item.name for item in fields(record)}
    return {name: value for name, value in values.items() if name in names}
