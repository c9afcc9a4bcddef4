"""The peak of bytes that tensors hold, by operator, without a device and without memory."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make inside the context, until they are freed.

    Entered inside a `FakeTensorMode`, tensors of any size and device cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}  # storages by address; a freed address is used again

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        for tensor in tree_leaves((arguments, options)):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), made=False)
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), made=True)
        return result

    def _count(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if made else 0
        self.known[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]
