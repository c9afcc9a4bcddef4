"""Training of teacher and student with Lightning's Trainer.

| module | what it does |
|---|---|
| `loop.py` | a module and its loaders -> the weights with the best validation metric |
| `batching.py` | the recipe's sections `data` and `trainer` -> how batches are made |
| `on_policy.py` | batches whose completions the student writes |
| `served_writer.py` | those completions by a server, stored before they are used |
| `adapter.py` | puts an adapter beside the student, writes and merges it |
| `hardware.py` | resolves `auto` for this device |
| `techniques.py` | the recipe's callbacks -> objects, checked against each other |
| `validation_runs.py` | when validation runs take place, which step did best, when to stop early |
| `checkpoints.py` | when the state is saved, and the seed of each batch |
| `checkpoint_writer.py` | writes checkpoints in a thread, while training goes on |
| `checkpoint_files.py` | files of checkpoints: which one a run resumes from, which are kept |
| `loggers.py` | metrics.csv and Weights & Biases |
| `progress.py` | progress bar and log lines of a training |
| `throughput.py` | tokens per second, model FLOPs utilization, peak memory |
| `performance.py` | compilation of a step; what an online teacher adds to a step |
"""

from distill.training.hardware import check_device, resolve_auto, resolve_precision
from distill.training.loggers import Tracker, check_tracking
from distill.training.loop import Training, count_steps, fit, make_loaders
from distill.training.served_writer import check_server
from distill.training.techniques import (
    bind_callbacks,
    build_callbacks,
    check_completions,
    check_memory,
    check_optimizer,
)

__all__ = [
    "Tracker",
    "Training",
    "bind_callbacks",
    "build_callbacks",
    "check_completions",
    "check_device",
    "check_memory",
    "check_optimizer",
    "check_server",
    "check_tracking",
    "count_steps",
    "fit",
    "make_loaders",
    "resolve_auto",
    "resolve_precision",
]
