"""`Run.data` -> batches: a source is opened, cut into splits, tokenised once, and handed out in an order fixed by (seed, epoch)."""

from distill.data.batches import BatchPlan, Examples, Loader, MicroBatch, by_example, idle, loader
from distill.data.encoding import encode, fingerprint, labelled_only
from distill.data.sources import open_source
from distill.data.splits import load

__all__ = [
    "BatchPlan",
    "Examples",
    "Loader",
    "MicroBatch",
    "by_example",
    "encode",
    "fingerprint",
    "idle",
    "labelled_only",
    "load",
    "loader",
    "open_source",
]
