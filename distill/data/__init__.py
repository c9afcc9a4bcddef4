"""`Run.data` -> batches: a source is opened, cut into splits, tokenised once, and handed out in an order fixed by (seed, epoch)."""

from distill.data.batches import (
    BatchPlan,
    EncodedDataset,
    Loader,
    MicroBatch,
    columns_to_examples,
    is_dummy_batch,
    make_loader,
)
from distill.data.encoding import encode, fingerprint, only_labelled
from distill.data.sources import open_source
from distill.data.splits import load

__all__ = [
    "BatchPlan",
    "EncodedDataset",
    "Loader",
    "MicroBatch",
    "columns_to_examples",
    "encode",
    "fingerprint",
    "is_dummy_batch",
    "only_labelled",
    "load",
    "make_loader",
    "open_source",
]
