"""metrics -> rows for people: one list of rows behind the table in the terminal and the one in the model card."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

LABELS = 12  # metrics of single labels are shown up to this many labels

COSTS = {
    "parameters": ("parameters, million", 1e-6),
    "weight_bytes": ("weights, MB", 1e-6),
    "disk_bytes": ("bytes on disk, MB", 1e-6),
    "bits_per_weight": ("effective bits per weight", 1.0),
    "memory_peak_bytes": ("peak memory of the process, MB", 1e-6),
    "memory_before_bytes": ("  before the model was loaded, MB", 1e-6),
    "device_peak_bytes": ("peak memory on the device, MB", 1e-6),
    "latency_p50_ms": ("latency of one request, p50, ms", 1.0),
    "latency_p90_ms": ("latency of one request, p90, ms", 1.0),
    "latency_p99_ms": ("latency of one request, p99, ms", 1.0),
    "examples_per_s": ("throughput, examples/s", 1.0),
    "tokens_per_s": ("throughput, tokens/s", 1.0),
}


OF_COMPRESSION = (
    "bits_per_weight",
)  # shown only where there is something to see: beside the dense student


class Row(NamedTuple):
    """One line: each model's value, those of `dense` empty where nothing was compressed, and student / teacher."""

    group: str
    name: str
    teacher: str
    dense: str
    student: str
    ratio: str


def rows(metrics: dict[str, Any]) -> list[Row]:
    """Every line, grouped by quality, fidelity and cost; without a teacher its column and the ratio are empty."""
    return [*_quality(metrics), *_fidelity(metrics), *_cost(metrics)]


def columns(metrics: dict[str, Any]) -> tuple[str, ...]:
    """The columns that there are, by the fields of a row."""
    return (
        ("teacher", "dense", "student", "ratio")
        if "dense" in metrics
        else ("teacher", "student", "ratio")
    )


def _of(metrics: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """Quality or cost of student, dense and teacher, empty where there is no such model."""
    return [metrics.get(who, {}).get(what, {}) for who in ("student", "dense", "teacher")]


def _quality(metrics: dict[str, Any]) -> Iterator[Row]:
    student, dense, teacher = _of(metrics, "quality")
    crowded = sum("/" in name for name in student) > LABELS
    for name, measured in student.items():
        if not (crowded and "/" in name):
            before, other = dense.get(name, {}), teacher.get(name, {})
            ratio = _ratio(measured["value"], other.get("value"))
            shown = [_with_interval(each) for each in (other, before, measured)]
            yield Row("quality", name.replace("_", " "), shown[0], shown[1], shown[2], ratio)


def _fidelity(metrics: dict[str, Any]) -> Iterator[Row]:
    if "comparison" in metrics:
        compared = metrics["comparison"]
        name = f"{compared['metric'].replace('_', ' ')}, student - teacher"
        yield Row(
            "fidelity",
            name,
            "",
            "",
            _with_interval(compared["difference"]),
            f"p = {number(compared['p'])}",
        )
    if "fidelity" in metrics:
        student = metrics["fidelity"]
        dense, divergence = student.get("dense", {}), student["name"].replace("_", " ")
        for key, name in (
            ("agreement", "agreement with the teacher"),
            ("divergence", f"{divergence} from the teacher"),
        ):
            yield Row("fidelity", name, "", number(dense.get(key)), number(student[key]), "")


def _cost(metrics: dict[str, Any]) -> Iterator[Row]:
    costs = _of(metrics, "cost")
    for key, (name, scale) in COSTS.items():
        if key in costs[0] and ("dense" in metrics or key not in OF_COMPRESSION):
            student, dense, teacher = (cost[key] * scale if key in cost else None for cost in costs)
            yield Row(
                "cost",
                name,
                number(teacher),
                number(dense),
                number(student),
                _ratio(student, teacher),
            )


def number(value: float | None) -> str:
    """Three or four digits that matter; nothing where there is no value."""
    if value is None or not math.isfinite(value):
        return ""
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def _with_interval(measured: dict[str, float | None]) -> str:
    value, low, high = (number(measured.get(key)) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if low and high else value


def _ratio(student: float | None, teacher: float | None) -> str:
    return (
        ""
        if student is None or teacher is None or teacher <= 0 or student < 0
        else f"{student / teacher:.2f}x"
    )


def conditions(metrics: dict[str, Any]) -> str:
    """What the figures hold for: examples, intervals and machine, in one sentence each."""
    machine = metrics.get("machine", {})
    drawn = f"95 % intervals from {metrics['resamples']:,} bootstrap resamples"
    texts = metrics.get("texts", metrics["examples"])
    whole = f"{texts:,} texts" + (
        f", in {metrics['examples']:,} windows," if texts < metrics["examples"] else ""
    )
    said = f"{whole} of the {metrics['split']} split; {drawn}."
    if machine:
        where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        how = f"{machine['threads']} thread(s), {machine['dtype']}, {machine['attention']} attention, torch {machine['torch']}"
        said += f" Cost on {where}, {how}; the models took turns at {machine['requests']} single requests and {machine['batches']} batches."
    return said


def table(metrics: dict[str, Any]) -> Table:
    """The rows for a terminal of 100 columns."""
    drawn = Table(caption=conditions(metrics), caption_justify="left", pad_edge=False)
    drawn.add_column("")
    shown = columns(metrics)
    for title in shown:
        drawn.add_column(title, justify="right")
    group = ""
    for row in rows(metrics):
        if row.group != group:
            drawn.add_section()
            drawn.add_row(Text(row.group, "bold"))
        group = row.group
        cells = (row._asdict()[column] for column in shown)
        if "dense" in shown:  # intervals below their values, or the names would be squeezed
            cells = (cell.replace(" [", "\n[") for cell in cells)
        drawn.add_row(*(Text(cell) for cell in (f"  {row.name}", *cells)))
    return drawn


def markdown(metrics: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    shown = columns(metrics)
    lines = [
        "".join(f"| {title} " for title in ("", *shown)).replace("|  |", "| |") + "|",
        "|---" + "|---:" * len(shown) + "|",
    ]
    group = ""
    for row in rows(metrics):
        if row.group != group:
            lines.append(f"| **{row.group}** " + "| " * len(shown) + "|")
        group = row.group
        name = row.name.strip().replace("|", r"\|")
        lines.append(" | ".join([f"| {name}", *(row._asdict()[column] for column in shown)]) + " |")
    return "\n".join([*lines, "", conditions(metrics)])


RUNTIME_COLUMNS = (
    "",
    "bytes, MB",
    "agreement",
    "quality",
    "p50 / p90 / p99, ms",
    "texts/s",
    "memory, MB",
    "latency",
    "throughput",
)


def runtime_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """A line for each runtime, by RUNTIME_COLUMNS; the last two are ratios to the baseline, which comes first."""
    return [_runtime_row(name, metrics) for name in metrics["runtimes"]]


def _runtime_row(name: str, metrics: dict[str, Any]) -> list[str]:
    found, baseline = metrics["runtimes"][name], metrics["runtimes"][metrics["baseline"]]["cost"]
    spent, worth = found["cost"], found["quality"].get(metrics["metric"], {})
    latencies = " / ".join(number(spent[f"latency_p{share}_ms"]) for share in (50, 90, 99))
    ratios = [_ratio(spent[key], baseline[key]) for key in ("latency_p50_ms", "examples_per_s")]
    bytes, memory = (number(size / 1e6) for size in (found["bytes"], spent["memory_peak_bytes"]))
    said = [_with_interval(share) for share in (found["agreement"], worth)]
    return [name, bytes, *said, latencies, number(spent["examples_per_s"]), memory, *ratios]


def of_runtimes(metrics: dict[str, Any]) -> Table:
    """The lines for a terminal of 100 columns."""
    drawn = Table(caption=runtime_conditions(metrics), caption_justify="left", pad_edge=False)
    for title in RUNTIME_COLUMNS:
        drawn.add_column(
            title.replace(" / ", "\n"), justify="right" if title else "left", no_wrap=not title
        )
    for row in runtime_rows(metrics):
        drawn.add_row(*(Text(cell.replace(" [", "\n[").replace(" / ", "\n")) for cell in row))
    return drawn


def runtime_conditions(metrics: dict[str, Any]) -> str:
    """What the figures hold for."""
    machine = metrics["machine"]
    fastest = metrics.get("fastest", {})
    named = (
        f" Fastest for a request {fastest['latency']}, for batches {fastest['throughput']}."
        if fastest
        else ""
    )
    took = f"{machine['requests']} single requests and {machine['batches']} batches of texts cut to what is read, tokenising included"
    return (
        f"{metrics['examples']:,} texts; agreement with the trained student; {metrics['metric'].replace('_', ' ')} with its 95 % interval; "
        f"ratios to the {metrics['baseline']} in float32. {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}; "
        f"all took turns at {took}.{named}"
    )
