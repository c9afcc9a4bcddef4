"""Loading, splitting, encoding and batching the data of a recipe (its section `data`).

| file | contents |
|---|---|
| `sources.py` | a function, a file, a folder or a Hub dataset -> its splits |
| `splits.py` | a source -> the raw splits train, validation and test |
| `columns.py` | the text and label columns of a split, checked |
| `holdout.py` | held-out examples, and removal of labels |
| `encoding.py` | raw splits -> encoded examples, cached by their content |
| `batches.py` | the order of examples: micro-batches by seed, epoch and rank |
| `loader.py` | micro-batches -> batches of tensors, resumable |
| `teacher_columns.py` | columns of cached teacher outputs -> tensors of a batch |
| `user_batches.py` | tensors of a user's own data loader -> batches |
"""

from distill.data.batches import Batching, BatchPlan, MicroBatch, is_dummy_batch
from distill.data.encoding import encode, fingerprint, only_labelled
from distill.data.loader import EncodedDataset, Loader, columns_to_examples, make_loader
from distill.data.sources import open_source
from distill.data.splits import load, texts
from distill.data.user_batches import batch_from_columns

__all__ = [
    "BatchPlan",
    "Batching",
    "EncodedDataset",
    "Loader",
    "MicroBatch",
    "batch_from_columns",
    "columns_to_examples",
    "encode",
    "fingerprint",
    "is_dummy_batch",
    "load",
    "make_loader",
    "only_labelled",
    "open_source",
    "texts",
]
