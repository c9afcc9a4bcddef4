"""Output in a terminal: a spinner while models are measured, then the table."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.evaluate.records import Metrics, RuntimesReport
from distill.stages import show_progress


@contextmanager
def status(message: str, progress: bool) -> Iterator[None]:
    """Show a spinner in a terminal, redrawn rarely because times are measured meanwhile."""
    if not show_progress(progress):
        yield
        return
    from rich.console import Console

    with Console().status(message, refresh_per_second=2):
        yield


def show(
    metrics: Metrics | RuntimesReport, folder: Path | None = None, export: Path | None = None
) -> None:
    """Print the table of a measurement, and the folders of the run and of its export."""
    from rich.console import Console

    from distill.evaluate import replies_table, runtimes_table, table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    rendered = (
        table.table(metrics) if isinstance(metrics, Metrics) else runtimes_table.table(metrics)
    )
    console.print(rendered)
    if isinstance(metrics, Metrics) and metrics.replies is not None:
        console.print(replies_table.table(metrics.replies))
    for name, path in (("run", folder), ("export", export)):
        if path is not None:
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)


@contextmanager
def show_on_error(metrics: Metrics | RuntimesReport | None) -> Iterator[None]:
    """Print a measurement if the block raises: nothing that was measured is lost."""
    try:
        yield
    except Exception:
        if metrics is not None:
            show(metrics)
        raise
