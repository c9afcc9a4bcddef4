"""Loading, splitting, encoding and batching the data of a recipe (its section `data`).

| file | contents |
|---|---|
| `sources.py` | a function, a file, a folder or a Hub dataset -> its splits |
| `split_files.py` | the files of a folder -> splits, of one file or of shards |
| `delimited.py` | the delimiter and quotes of a CSV or TSV file; rows that a quote swallows |
| `splits.py` | a source -> the raw splits train, validation and test |
| `columns.py` | the text and label columns of a split, checked |
| `message_column.py` | a column of messages -> conversations as text, cached by their content |
| `label_column.py` | labels by row, each distinct one stored once |
| `holdout.py` | held-out examples, and removal of labels |
| `stratified.py` | draws in which classes keep their shares |
| `encoding.py` | raw splits -> encoded examples, cached by their content |
| `encode_chunks.py` | a function on chunks of a split, in several processes |
| `content_hash.py` | a hash of the content of a split |
| `batches.py` | the order of examples: micro-batches by seed, epoch and rank |
| `loader.py` | micro-batches -> batches of tensors, resumable |
| `streams.py` | `data.streaming`: shards -> rows in an order of seed and epoch |
| `stream_loader.py` | a stream of rows -> batches of tensors, resumable |
| `completions.py` | examples -> prompts, and examples with other completions |
| `prefetch.py` | items of an iterator, made ahead by a thread |
| `teacher_columns.py` | columns of cached teacher outputs -> tensors of a batch |
| `token_spans.py` | tokens of two tokenizers -> spans of the same bytes |
| `user_batches.py` | tensors of a user's own data loader -> batches |
"""

from distill.data.batches import Batching, BatchPlan, MicroBatch, is_dummy_batch
from distill.data.content_hash import fingerprint
from distill.data.encoding import encode, labelled_rows, only_labelled
from distill.data.holdout import HOLDOUT_VERSION
from distill.data.loader import (
    Collator,
    EncodedDataset,
    Loader,
    columns_to_examples,
    make_loader,
)
from distill.data.prefetch import prefetch
from distill.data.sources import open_source
from distill.data.splits import load, texts
from distill.data.stream_loader import Encoder, StreamLoader, make_stream_loader
from distill.data.streams import Stream, open_stream
from distill.data.user_batches import batch_from_columns

__all__ = [
    "HOLDOUT_VERSION",
    "BatchPlan",
    "Batching",
    "Collator",
    "EncodedDataset",
    "Encoder",
    "Loader",
    "MicroBatch",
    "Stream",
    "StreamLoader",
    "batch_from_columns",
    "columns_to_examples",
    "encode",
    "fingerprint",
    "is_dummy_batch",
    "labelled_rows",
    "load",
    "make_loader",
    "make_stream_loader",
    "only_labelled",
    "open_source",
    "open_stream",
    "prefetch",
    "texts",
]
