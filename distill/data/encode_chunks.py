"""Calls a function on chunks of a split, in several processes if there are many.

Processes are forked, so that they share the split and the function without copying them. The
results and their order do not depend on the number of processes.
"""

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pyarrow as pa
from datasets import Dataset

from distill.errors import RunFailed

PARALLEL_ROWS = 20_000  # fewer are encoded before processes are worth their start
_AHEAD = 4  # chunks that may wait for each process
_POLL_SECONDS = 0.5
_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"  # of the library tokenizers: one in each process

Encode = Callable[[dict[str, list[Any]]], pa.Table]


def count_processes(rows: int) -> int:
    """Processes for a split of this size; 1 encodes in this process, with the library's threads."""
    if rows < PARALLEL_ROWS or sys.platform != "linux":
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def map_chunks(split: Dataset, encode: Encode, size: int, processes: int) -> Iterator[pa.Table]:
    """The tables that `encode` makes of each chunk, in order.

    Args:
        split: Its rows are read as lists by column.
        encode: Called on a dictionary of columns.
        size: Rows of a chunk.
        processes: How many work at the same time.
    """
    rows = split.with_format(None)
    chunks = [slice(start, start + size) for start in range(0, len(rows), size)]
    if processes == 1:
        yield from (encode(rows[chunk]) for chunk in chunks)
        return
    with _forked(rows, encode, processes) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _forked(rows: Dataset, encode: Encode, processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that hold the split and the function."""
    threads = os.environ.get(_TOKENIZER_THREADS)
    os.environ[_TOKENIZER_THREADS] = "false"
    pool = ProcessPoolExecutor(
        processes, get_context("fork"), initializer=_start, initargs=(rows, encode, os.getpid())
    )
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of locks of other threads; the libraries here reset theirs.
            warnings.filterwarnings("ignore", "This process .* multi-threaded", DeprecationWarning)
            yield pool
    except BrokenProcessPool as error:
        raise RunFailed(
            f"{processes} processes tokenize the texts, but one of them was killed, perhaps for "
            "lack of memory: make room and start again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        if threads is None:
            del os.environ[_TOKENIZER_THREADS]
        else:
            os.environ[_TOKENIZER_THREADS] = threads


_job: tuple[Dataset, Encode]  # of this process, if it was forked by a pool


def _start(rows: Dataset, encode: Encode, parent: int) -> None:
    """Prepare a forked process, which ends with its parent; Ctrl-C is the parent's to answer."""
    global _job
    _job = rows, encode
    gc.freeze()  # or collections would write to shared pages, which copies them
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="exit_with_parent").start()


def _encode_in_worker(chunk: slice) -> pa.Table:
    rows, encode = _job
    return encode(rows[chunk])
