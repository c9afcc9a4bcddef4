"""The contents of metrics.json and runtimes.json as dataclasses; NaN is None in JSON."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Self

Json = dict[str, Any]

MODELS = ("teacher", "dense", "student")  # in the order of every table and file


class Interval(NamedTuple):
    """A metric and the ends of its 95 % interval; NaN where one cannot be computed."""

    value: float
    low: float
    high: float

    def to_json(self) -> Json:
        return self._asdict()

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(*(_number(values.get(name)) for name in cls._fields))


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
        return cls(**_known(cls, values))


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
        return cls(**_known(cls, values))


@dataclass(frozen=True)
class ModelMetrics:
    """Quality and cost of one model."""

    quality: dict[str, Interval]  # by metric
    cost: Cost = Cost()

    def to_json(self) -> Json:
        return {"quality": _to_json(self.quality), "cost": self.cost.to_json()}

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(_intervals(values["quality"]), Cost.from_json(values.get("cost", {})))


@dataclass(frozen=True)
class Comparison:
    """Student and teacher on the same examples, by the task's primary metric."""

    metric: str
    maximize: bool  # whether a larger value is better
    difference: Interval  # student - teacher
    p: float  # two-sided p-value of the difference

    def to_json(self) -> Json:
        return {
            "metric": self.metric,
            "maximise": self.maximize,
            "difference": self.difference.to_json(),
            "p": self.p,
        }

    @classmethod
    def from_json(cls, values: Json) -> Self:
        difference = Interval.from_json(values["difference"])
        return cls(values["metric"], values["maximise"], difference, _number(values["p"]))


@dataclass(frozen=True)
class Fidelity:
    """How closely a model follows the teacher, as means over all rows."""

    agreement: float  # share of rows with the teacher's prediction
    divergence: float  # from the teacher's distribution, in nats

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(_number(values["agreement"]), _number(values["divergence"]))


@dataclass(frozen=True)
class Metrics:
    """The contents of metrics.json: models measured on one split."""

    split: str
    examples: int
    texts: int  # fewer than examples where long texts were split into windows
    models: dict[str, ModelMetrics]  # by `teacher`, `dense` and `student`
    resamples: int  # bootstrap resamples of each interval
    machine: Machine
    comparison: Comparison | None = None  # with a teacher
    fidelity: dict[str, Fidelity] | None = None  # with a teacher: of `student` and `dense`
    divergence: str | None = None  # function of distill.losses in `fidelity`
    form: Json | None = None  # export settings of the measured student
    training: Json | None = None  # results of the training
    stages: dict[str, float] | None = None  # seconds of each stage of the run

    def to_json(self) -> Json:
        fidelity = None
        if self.fidelity is not None:
            others = {name: part for name, part in self.fidelity.items() if name != "student"}
            fidelity = self.fidelity["student"].to_json() | _to_json(others)
            fidelity["name"] = self.divergence
        optional = {
            "comparison": self.comparison and self.comparison.to_json(),
            "resamples": self.resamples,
            "fidelity": fidelity,
            "form": self.form,
            "machine": self.machine.to_json(),
            "training": self.training,
            "stages": self.stages,
        }
        return replace_nan(
            {"split": self.split, "examples": self.examples, "texts": self.texts}
            | _to_json(self.models)
            | {name: value for name, value in optional.items() if value is not None}
        )

    @classmethod
    def from_json(cls, values: Json) -> Self:
        """Read metrics.json, also of earlier versions; KeyError or TypeError if it is damaged."""
        models = {name: values[name] for name in MODELS if name in values}
        comparison, fidelity = values.get("comparison"), values.get("fidelity")
        return cls(
            split=values["split"],
            examples=values["examples"],
            texts=values["texts" if "texts" in values else "examples"],
            models={name: ModelMetrics.from_json(record) for name, record in models.items()},
            resamples=values["resamples"],
            machine=Machine.from_json(values["machine"]),
            comparison=None if comparison is None else Comparison.from_json(comparison),
            fidelity=None if fidelity is None else _fidelity(fidelity),
            divergence=None if fidelity is None else fidelity["name"],
            form=values.get("form"),
            training=values.get("training"),
            stages=values.get("stages"),
        )


@dataclass(frozen=True)
class RuntimeMetrics:
    """The student, or its teacher, in one runtime."""

    weight_bytes: int  # of the weights' files
    agreement: Interval  # share of predictions that are the trained student's
    quality: dict[str, Interval]
    cost: Cost

    def to_json(self) -> Json:
        return {
            "bytes": self.weight_bytes,
            "agreement": self.agreement.to_json(),
            "quality": _to_json(self.quality),
            "cost": self.cost.to_json(),
        }

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(
            values["bytes"],
            Interval.from_json(values["agreement"]),
            _intervals(values["quality"]),
            Cost.from_json(values["cost"]),
        )


@dataclass(frozen=True)
class RuntimesReport:
    """The contents of runtimes.json: a student in several runtimes."""

    examples: int
    baseline: str  # the runtime that ratios refer to
    metric: str  # the task's primary metric
    runtimes: dict[str, RuntimeMetrics]
    fastest: dict[str, str]  # runtime with the lowest `latency`, with the highest `throughput`
    machine: Machine

    def to_json(self) -> Json:
        return replace_nan(
            {
                "examples": self.examples,
                "baseline": self.baseline,
                "metric": self.metric,
                "runtimes": _to_json(self.runtimes),
                "fastest": self.fastest,
                "machine": self.machine.to_json(),
            }
        )

    @classmethod
    def from_json(cls, values: Json) -> Self:
        runtimes = values["runtimes"].items()
        return cls(
            values["examples"],
            values["baseline"],
            values["metric"],
            {name: RuntimeMetrics.from_json(record) for name, record in runtimes},
            values.get("fastest", {}),
            Machine.from_json(values["machine"]),
        )


def replace_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None in nested dictionaries."""
    if isinstance(value, dict):
        return {key: replace_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_json(records: dict[str, Any]) -> Json:
    return {name: record.to_json() for name, record in records.items()}


def _intervals(values: Json) -> dict[str, Interval]:
    return {metric: Interval.from_json(record) for metric, record in values.items()}


def _fidelity(values: Json) -> dict[str, Fidelity]:
    models = {"student": values} | {name: values[name] for name in MODELS if name in values}
    return {name: Fidelity.from_json(record) for name, record in models.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _known(record: type, values: Json) -> Json:
    """The values that the record has fields for; another version may have written others."""
    names = {item.name for item in fields(record)}
    return {name: value for name, value in values.items() if name in names}
