"""The contents of metrics.json and runtimes.json as dataclasses; NaN is None in JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from distill.evaluate.record_parts import (
    Cost,
    Generation,
    Interval,
    Json,
    Machine,
    Replies,
    number,
    replace_nan,
)

__all__ = [
    "MODELS",
    "Comparison",
    "Cost",
    "Fidelity",
    "Generation",
    "Interval",
    "Machine",
    "Metrics",
    "ModelMetrics",
    "Replies",
    "RuntimeMetrics",
    "RuntimesReport",
]

MODELS = ("teacher", "dense", "student")  # in the order of every table and file


@dataclass(frozen=True)
class ModelMetrics:
    """Quality and cost of one model."""

    quality: dict[str, Interval]  # by metric
    cost: Cost = field(default_factory=Cost)
    generation: Generation | None = None
    harness: dict[str, Interval] = field(default_factory=dict)  # by task and metric of lm-eval

    def to_json(self) -> Json:
        optional = {
            "generation": self.generation and self.generation.to_json(),
            "harness": _to_json(self.harness),
        }
        return {"quality": _to_json(self.quality), "cost": self.cost.to_json()} | {
            name: value for name, value in optional.items() if value
        }

    @classmethod
    def from_json(cls, values: Json) -> Self:
        generation = values.get("generation")
        return cls(
            _intervals(values["quality"]),
            Cost.from_json(values.get("cost", {})),
            generation and Generation.from_json(generation),
            _intervals(values.get("harness", {})),
        )


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
        return cls(values["metric"], values["maximise"], difference, number(values["p"]))


@dataclass(frozen=True)
class Fidelity:
    """How closely a model follows the teacher, as means over all rows."""

    agreement: float  # share of rows with the teacher's prediction
    divergence: float  # from the teacher's distribution, in nats

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> Self:
        return cls(number(values["agreement"]), number(values["divergence"]))


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
    replies: Replies | None = None  # of language models, if generation was measured
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
            "replies": self.replies and self.replies.to_json(),
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
        replies = values.get("replies")
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
            replies=replies and Replies.from_json(replies),
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


def _to_json(records: dict[str, Any]) -> Json:
    return {name: record.to_json() for name, record in records.items()}


def _intervals(values: Json) -> dict[str, Interval]:
    return {metric: Interval.from_json(record) for metric, record in values.items()}


def _fidelity(values: Json) -> dict[str, Fidelity]:
    models = {"student": values} | {name: values[name] for name in MODELS if name in values}
    return {name: Fidelity.from_json(record) for name, record in models.items()}
