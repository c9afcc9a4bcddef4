"""Measures a student beside its teacher: quality, fidelity, latency, throughput, memory, bytes.

`python -m distill.evaluate` is the command. README.md describes what is measured, and how.

| module | contents |
|---|---|
| `evaluate_command.py` | the command line |
| `evaluate_run.py` | measures the models of a run, the student in its exported format |
| `measure.py` | measures models on a split |
| `inputs.py` | the inputs of measurements: encoded examples, timed inputs |
| `outcomes.py` | one pass of all models over the same examples |
| `quality.py` | bootstrap intervals and the paired comparison |
| `cost.py` | latency, throughput, memory and bytes, in isolated processes |
| `settings.py` | the sections of a recipe that decide how models are measured |
| `runtimes.py` | measures a student in several runtimes |
| `runtime_names.py` | the names of runtimes |
| `runtime_setup.py` | a model in the form that each runtime loads |
| `measure_replies.py` | what language models write, and their fidelity to the teacher |
| `replies.py` | greedy replies of a language model to prompts |
| `reply_scores.py` | replies compared with those in the data |
| `replies_table.py` | the rows of generation, and replies side by side |
| `lm_eval_tasks.py` | metrics on tasks of lm-eval |
| `record_parts.py` | parts of the records: intervals, costs, the machine, generation |
| `records.py` | the contents of metrics.json and runtimes.json |
| `run_folder.py` | models and measurements in the folder of a run |
| `table.py`, `runtimes_table.py` | the tables for people |
| `table_cells.py` | lines of a table, and how numbers are shown |
| `console.py` | output in a terminal |
"""

from distill.evaluate.console import show, show_on_error, status
from distill.evaluate.evaluate_command import Options, main
from distill.evaluate.evaluate_run import evaluate, export_spec
from distill.evaluate.lm_eval_tasks import check_settings
from distill.evaluate.records import Metrics, RuntimesReport
from distill.evaluate.run_folder import (
    METRICS,
    REPORT,
    RUNTIMES,
    check_run_folder,
    find_models,
    read_metrics,
    write_metrics,
    write_report,
)

__all__ = [
    "METRICS",
    "REPORT",
    "RUNTIMES",
    "Metrics",
    "Options",
    "RuntimesReport",
    "check_run_folder",
    "check_settings",
    "evaluate",
    "export_spec",
    "find_models",
    "main",
    "read_metrics",
    "show",
    "show_on_error",
    "status",
    "write_metrics",
    "write_report",
]
