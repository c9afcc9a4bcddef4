"""Items of an iterator, made ahead by a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], ahead: int = 4) -> Iterator[T]:
    """Make the items in a thread, at most `ahead` before they are needed; errors are raised here.

    The thread ends with the iterator, also when that is left early.
    """
    made: queue.Queue[Any] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    # A thread begins on the first GPU, where pinned memory would be registered.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def produce() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # noqa: BLE001  raised by the consumer
            put((_END, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
