"""Private and undocumented attributes of torch, Lightning, transformers and Python.

They are used only here. Each function gives the reason, and each section the versions for which it
was checked. `tests/unit/test_internals.py` fails when a library changes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:  # keeps the import of this module cheap
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

NEVER = 1 << 62  # micro-batches
# Whether a mask may be left out, asked with a mask of padding that may be None.
_MASK_DECISIONS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")

# ---- Python 3.11 to 3.14


def run_exit_functions() -> None:
    """Call the functions that `atexit` holds; a rank that ends by `os._exit` would skip them."""
    import atexit

    atexit._run_exitfuncs()


# ---- torch 2.11 to 2.13


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor consists of others, as torchao's do. torch documents no public query."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those of which a wrapper consists: integers and scales."""
    if not is_wrapper(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for part in (getattr(tensor, name) for name in names):
        if part is not None:
            yield from stored_tensors(part)


def cpu_supports_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions. torch has no public query for CPUs."""
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def constant_buffers() -> dict[str, bool]:
    """The argument that stops DDP from syncing buffers. torch 2.13 renamed `broadcast_buffers`."""
    from inspect import signature

    from torch.nn.parallel import DistributedDataParallel

    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in signature(DistributedDataParallel).parameters else old: False}


@contextmanager
def keep_in_place(module: nn.Module) -> Iterator[None]:
    """Let `to` of a model leave a module's tensors where they are; no argument of it does."""
    module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module._apply


def leave_out_of_ddp(module: nn.Module, names: list[str]) -> None:
    """Let DDP neither copy nor reduce these tensors. It has no public argument for it.

    It would copy the bytes of a tensor of 4 bits as if they were numbers.
    """
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def attention_operators() -> list[Any]:
    """The operators that compute `scaled_dot_product_attention`, as dispatch modes see them."""
    import torch

    names = ("efficient", "flash", "cudnn", "flash_attention_for_cpu")
    return [
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        for name in (*(f"{name}_attention" for name in names[:3]), names[3])
    ]


def undo_compile(module: nn.Module) -> None:
    """Make a module's forward run as it is written again. `Module.compile` has no inverse."""
    module._compiled_call_impl = None


def stored_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter that a module stores under a name, None if it has none.

    `getattr(module, name)` would compute the fake-quantized value.
    """
    return module._parameters.get(name)


# ---- Lightning 2.6


def disable_signal_handlers(trainer: L.Trainer) -> None:
    """Leave signals to `distill.processes.signals`. The Trainer has no option for it.

    Nor need its ranks compare signals in each step, which is a collective and a CPU-GPU sync point.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


def limit_steps(trainer: L.Trainer, steps: int) -> None:
    """Set `max_steps` of a Trainer that has epochs, for schedules that count steps."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def validate_after_batch(trainer: L.Trainer, validate: bool) -> None:
    """Set whether a validation run follows this batch; `val_check_interval` counts no steps."""
    trainer.val_check_batch = 1 if validate else NEVER  # the loop tests batch % val_check_batch


def batches_started(trainer: L.Trainer) -> int:
    """Micro-batches that this rank started before this one, in all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def batches_of_epoch(trainer: L.Trainer) -> int:
    """Micro-batches that this rank completed in this epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.completed


def rewind_one_batch(fit_loop: dict[str, Any]) -> None:
    """Turn the saved state of a fit loop back to before the batch that was just fetched.

    Callbacks are not finished at the end of a batch, so checkpoints are taken at the start of the
    next one, which is counted by then. Lightning adds 1 to `_batches_that_stepped` when it loads.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    progress["total"]["ready"] -= 1
    progress["current"]["ready"] -= 1
    progress["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for loader in fit_loop["state_dict"]["combined_loader"]:
        loader["position"] -= 1  # of `distill.data.Loader`


def rewrap_ddp(strategy: DDPStrategy, module: L.LightningModule) -> None:
    """Rebuild DDP's gradient buckets after parameters were replaced; it fills them only once."""
    strategy.model = strategy._setup_model(module)


# ---- transformers 5.17 to 5.24


def forget_cache_length(model: PreTrainedModel) -> None:
    """Give the next static cache of `generate` the length that it needs.

    transformers makes it as long as the longest one of this process, so that rounding would depend
    on what was generated before.
    """
    setattr(model, "_previous_max_cache_length", -1)  # noqa: B010  nn.Module types it as a tensor


@contextmanager
def known_padding(padded: bool | None) -> Iterator[None]:
    """Build attention masks from what is known about a batch; None lets transformers find out.

    Without it each model asks the device whether its mask is all ones, a CPU-GPU sync point. On a
    GPU, a causal mask leaves out padding on the right, which no token before it attends to: that
    needs no mask, so that a faster kernel computes the attention.

    Args:
        padded: Whether a row of the batch is padded, on the right.
    """
    from transformers import masking_utils

    causal, bidirectional = (getattr(masking_utils, name) for name in _MASK_DECISIONS)

    def decide(original: Any, mask: Tensor | None, *sizes: Any, **options: Any) -> bool:
        ignored = original is causal and mask is not None and mask.is_cuda
        unmasked = mask is None or not padded or ignored
        return unmasked and original(None, *sizes, **options)

    try:
        if padded is not None:
            decisions = (partial(decide, causal), partial(decide, bidirectional))
            masking_utils.__dict__.update(zip(_MASK_DECISIONS, decisions, strict=True))
        yield
    finally:
        originals = (causal, bidirectional)
        masking_utils.__dict__.update(zip(_MASK_DECISIONS, originals, strict=True))


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The attention that a loaded model uses (`sdpa`, `eager`), to build another with the same."""
    return config._attn_implementation


def model_class(auto_class: str, config: PreTrainedConfig) -> type | None:
    """The class that an auto class builds for a config, None if it has none.

    Its public methods only build the whole model.
    """
    import transformers

    mapping = getattr(transformers, auto_class)._model_mapping
    return mapping[type(config)] if type(config) in mapping else None  # noqa: SIM401


def auto_class(model: PreTrainedModel) -> str:
    """The auto class, such as `AutoModelForCausalLM`, that builds models of this model's class."""
    from transformers.models.auto import modeling_auto

    for name in modeling_auto.__all__:
        if name.startswith("AutoModelFor") and name != "AutoModelForPreTraining":
            built = model_class(name, model.config)
            if built is not None and built.__name__ == type(model).__name__:
                return name
    raise UserError(
        f"the model is a {type(model).__name__}, but no auto class of transformers builds it: "
        "export it without compression that needs code"
    )
