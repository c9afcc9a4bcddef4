"""The blocks of a frozen model in the memory of the CPU, each on the device while it runs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import internals
from distill.models.families import blocks
from distill.models.forward import resolve_device
from distill.recipe import config

log = logging.getLogger("distill")


def offloaded_teacher(
    spec: config.Teacher | None, trainer: config.Trainer, teacher: Any
) -> AbstractContextManager[None]:
    """:func:`offloaded` for a teacher that is a complete model, if the recipe asks for it."""
    if spec is None or not spec.offload or not isinstance(teacher, PreTrainedModel):
        return nullcontext()
    return offloaded(teacher, resolve_device(trainer))


@contextmanager
def offloaded(model: PreTrainedModel, device: str) -> Iterator[None]:
    """Keep the blocks of a frozen model on the CPU inside the context.

    Moving the model then moves its other weights: embeddings, last normalization, head. The tensors
    of a block are copied to the device before its forward and released after it, so that outputs
    are the same. For a GPU they are in pinned memory, which it reads without waiting for the CPU.

    Args:
        model: On the CPU, without gradients.
        device: `cpu`, which needs no copies, `cuda` or `meta`.
    """
    if device == "cpu":
        log.info(
            "teacher.offload is true, but this run computes on the CPU, where the teacher's "
            "weights are: it changes nothing"
        )
        yield
        return
    with ExitStack() as stack:
        for block in blocks(model):
            stack.enter_context(internals.keep_in_place(block))
            _Offload(block, device, stack.callback)
        yield


class _Offload:
    """The hooks of a block."""

    def __init__(self, block: nn.Module, device: str, at_end: Callable[..., Any]) -> None:
        self.device = device
        self.stored: dict[_Place, Tensor] = {}
        at_end(block.register_forward_pre_hook(self.load).remove)
        at_end(block.register_forward_hook(self.release, always_call=True).remove)

    def load(self, block: nn.Module, *_: Any) -> None:
        """Put copies on the device in the place of all tensors of the block."""
        self.stored = {place: self._pinned(tensor) for place, tensor in _tensors(block)}
        _place({place: _copy(each, self.device) for place, each in self.stored.items()})

    def release(self, block: nn.Module, *_: Any) -> None:
        _place(self.stored)
        self.stored = {}

    def _pinned(self, tensor: Tensor) -> Tensor:
        """The tensor, pinned when it is copied to a GPU for the first time."""
        if self.device != "cuda" or tensor.is_pinned() or internals.is_wrapper(tensor):
            return tensor
        with torch.inference_mode(False):  # it stays in the model
            return _like(tensor, tensor.detach().pin_memory())


_Place = tuple[nn.Module, str]  # a module, and the name of its tensor


def _tensors(block: nn.Module) -> Iterator[tuple[_Place, Tensor]]:
    """The parameters and buffers of all modules in a block."""
    for module in block.modules():
        for tensors in (module.named_parameters, module.named_buffers):
            yield from (((module, name), tensor) for name, tensor in tensors(recurse=False))


def _place(tensors: dict[_Place, Tensor]) -> None:
    for (module, name), tensor in tensors.items():
        setattr(module, name, tensor)


def _copy(tensor: Tensor, device: str) -> Tensor:
    return _like(tensor, tensor.detach().to(device, non_blocking=True))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """A frozen parameter of these values if the tensor is one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(values, requires_grad=False) if is_parameter else values
