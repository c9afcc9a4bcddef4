"""The rows of metrics.json, as a table in the terminal and in Markdown."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from distill.evaluate import replies_table
from distill.evaluate.records import MODELS, Cost, Metrics
from distill.evaluate.table_cells import (
    Row,
    format_interval,
    format_number,
    format_ratio,
    metric_row,
)

MAX_LABELS = 12  # metrics of single labels are shown up to this many labels

# field of Cost -> name of the row and factor of the shown value
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
COSTS_OF_COMPRESSION = ("bits_per_weight",)  # shown only beside the dense student


def rows(metrics: Metrics) -> list[Row]:
    """Every line, grouped by what is measured."""
    return [
        *_quality(metrics),
        *_harness(metrics),
        *_fidelity(metrics),
        *_cost(metrics),
        *replies_table.rows(metrics),
    ]


def columns(metrics: Metrics) -> tuple[str, ...]:
    """The fields of a row that are shown."""
    dense = ("dense",) if "dense" in metrics.models else ()
    return ("teacher", *dense, "student", "ratio")


def _quality(metrics: Metrics) -> Iterator[Row]:
    by_model = {name: model.quality for name, model in metrics.models.items()}
    names = by_model["student"]
    hides_labels = sum("/" in name for name in names) > MAX_LABELS
    for name in names:
        if hides_labels and "/" in name:
            continue
        yield metric_row("quality", name, [by_model.get(model, {}).get(name) for model in MODELS])


def _harness(metrics: Metrics) -> Iterator[Row]:
    """The metrics of lm-eval's tasks."""
    by_model = {name: model.harness for name, model in metrics.models.items()}
    for name in by_model["student"]:
        yield metric_row("lm-eval", name, [by_model.get(model, {}).get(name) for model in MODELS])


def _fidelity(metrics: Metrics) -> Iterator[Row]:
    compared = metrics.comparison
    if compared is not None:
        name = f"{compared.metric.replace('_', ' ')}, student - teacher"
        difference, p = format_interval(compared.difference), f"p = {format_number(compared.p)}"
        yield Row("fidelity", name, "", "", difference, p)
    if metrics.fidelity is not None:
        divergence = str(metrics.divergence).replace("_", " ")
        for field, name in (
            ("agreement", "agreement with the teacher"),
            ("divergence", f"{divergence} from the teacher"),
        ):
            dense, student = (
                format_number(getattr(metrics.fidelity.get(model), field, None))
                for model in ("dense", "student")
            )
            yield Row("fidelity", name, "", dense, student, "")


def _cost(metrics: Metrics) -> Iterator[Row]:
    for field, (name, factor) in COSTS.items():
        if field in COSTS_OF_COMPRESSION and "dense" not in metrics.models:
            continue
        teacher, dense, student = (_scaled(metrics, model, field, factor) for model in MODELS)
        if student is not None:
            yield Row(
                "cost",
                name,
                format_number(teacher),
                format_number(dense),
                format_number(student),
                format_ratio(student, teacher),
            )


def _scaled(metrics: Metrics, model: str, field: str, factor: float) -> float | None:
    cost = metrics.models[model].cost if model in metrics.models else Cost()
    value = getattr(cost, field)
    return None if value is None else value * factor


def conditions(metrics: Metrics) -> str:
    """The caption: what was measured, on which machine."""
    machine = metrics.machine
    windows = f", in {metrics.examples:,} windows," if metrics.texts < metrics.examples else ""
    device = machine.cpu if machine.device == "cpu" else machine.device
    return (
        f"{metrics.texts:,} texts{windows} of the {metrics.split} split; "
        f"95 % intervals from {metrics.resamples:,} bootstrap resamples. "
        f"Cost on {device}, {machine.threads} thread(s), {machine.dtype}, "
        f"{machine.attention} attention, torch {machine.torch}; the models took turns at "
        f"{machine.requests} single requests and {machine.batches} batches."
        f"{replies_table.conditions(metrics.replies)}"
    )


def table(metrics: Metrics) -> Table:
    """The rows for a terminal of 100 columns."""
    rendered = Table(caption=conditions(metrics), caption_justify="left", pad_edge=False)
    rendered.add_column("")
    shown = columns(metrics)
    for title in shown:
        rendered.add_column(title, justify="right")
    group = ""
    for row in rows(metrics):
        if row.group != group:
            rendered.add_section()
            rendered.add_row(Text(row.group, "bold"))
        group = row.group
        cells = (getattr(row, column) for column in shown)
        if "dense" in shown:  # intervals below their values leave room for the names
            cells = (cell.replace(" [", "\n[") for cell in cells)
        rendered.add_row(*(Text(cell) for cell in (f"  {row.name}", *cells)))
    return rendered


def markdown(metrics: Metrics) -> str:
    """The rows as a Markdown table."""
    shown = columns(metrics)
    lines = [f"| | {' | '.join(shown)} |", "|---" + "|---:" * len(shown) + "|"]
    group = ""
    for row in rows(metrics):
        if row.group != group:
            lines.append(f"| **{row.group}** " + "| " * len(shown) + "|")
        group = row.group
        name = row.name.strip().replace("|", r"\|")
        lines.append(" | ".join([f"| {name}", *(getattr(row, column) for column in shown)]) + " |")
    return "\n".join([*lines, "", conditions(metrics), *replies_table.markdown(metrics.replies)])
