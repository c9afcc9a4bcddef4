"""The rows of runtimes.json, as a table in the terminal."""

from typing import Literal

from rich.table import Table
from rich.text import Text

from distill.evaluate.records import RuntimesReport
from distill.evaluate.table_cells import format_interval, format_number, format_ratio

COLUMNS = (
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


def rows(report: RuntimesReport) -> list[list[str]]:
    """A row of COLUMNS for each runtime; the last two are ratios to the baseline."""
    return [_row(name, report) for name in report.runtimes]


def _row(name: str, report: RuntimesReport) -> list[str]:
    measured, baseline = report.runtimes[name], report.runtimes[report.baseline].cost
    cost = measured.cost
    latencies = (cost.latency_p50_ms, cost.latency_p90_ms, cost.latency_p99_ms)
    memory = None if cost.memory_peak_bytes is None else cost.memory_peak_bytes / 1e6
    return [
        name,
        format_number(measured.weight_bytes / 1e6),
        format_interval(measured.agreement),
        format_interval(measured.quality.get(report.metric)),
        " / ".join(map(format_number, latencies)),
        format_number(cost.examples_per_s),
        format_number(memory),
        format_ratio(cost.latency_p50_ms, baseline.latency_p50_ms),
        format_ratio(cost.examples_per_s, baseline.examples_per_s),
    ]


def table(report: RuntimesReport) -> Table:
    """The rows for a terminal of 100 columns."""
    rendered = Table(caption=conditions(report), caption_justify="left", pad_edge=False)
    for title in COLUMNS:
        justify: Literal["left", "right"] = "right" if title else "left"
        rendered.add_column(title.replace(" / ", "\n"), justify=justify, no_wrap=not title)
    for row in rows(report):
        rendered.add_row(*(Text(cell.replace(" [", "\n[").replace(" / ", "\n")) for cell in row))
    return rendered


def conditions(report: RuntimesReport) -> str:
    """The caption: what was measured, on which machine."""
    machine, fastest = report.machine, ""
    if report.fastest:
        fastest = (
            f" Fastest for a request {report.fastest['latency']}, "
            f"for batches {report.fastest['throughput']}."
        )
    return (
        f"{report.examples:,} texts; agreement with the trained student; "
        f"{report.metric.replace('_', ' ')} with its 95 % interval; "
        f"ratios to the {report.baseline} in float32. "
        f"{machine.cpu}, {machine.threads} thread(s), torch {machine.torch}; all took turns at "
        f"{machine.requests} single requests and {machine.batches} batches of truncated texts, "
        f"tokenization included.{fastest}"
    )
