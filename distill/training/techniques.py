"""The recipe's callbacks -> objects, in the order in which they act."""

from typing import Any

from datasets import Dataset
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from distill import data
from distill.callbacks.compression import (
    Compression,
    compressions,
    order_callbacks,
    prefix_with_key,
)
from distill.errors import UserError
from distill.models import adapters, frozen_weights
from distill.module.low_bit_optimizer import check_low_bits
from distill.recipe import capabilities, config, targets


def build_callbacks(
    specs: dict[str, dict[str, Any]], trainer: config.Trainer, export: config.Export
) -> list[Callback]:
    """The recipe's callbacks, checked before data and models are loaded.

    Args:
        specs: the recipe's section `callbacks`.
        trainer: its section `trainer`.
        export: its section `export`.

    Raises:
        UserError: if one is not a callback, or does not fit the trainer or the export format.
    """
    callbacks = [_build_callback(name, spec) for name, spec in specs.items()]
    techniques = compressions(callbacks)
    if techniques:
        _check_trainer(trainer, techniques[0].name)
    declared = [technique.quantization() for technique in techniques]
    quantized = [layers for layers in declared if layers is not None]
    capabilities.check_techniques(export.format, export.quantize, quantized)
    return callbacks


def check_optimizer(optimizer: config.Optimizer, callbacks: list[Callback]) -> None:
    """UserError if the optimizer's moments cannot be stored in 8 bits in this run."""
    check_low_bits(optimizer.bits, [technique.name for technique in compressions(callbacks)])


def check_completions(url: str | None, callbacks: list[Callback]) -> None:
    """UserError if a callback compresses weights that a server is to load."""
    for technique in compressions(callbacks) if url is not None else ():
        raise UserError(
            f"loss.completions_url is {url}, but callbacks.{technique.name} changes the student's "
            "layers while it trains, which a server cannot load: leave one of them out"
        )


def check_memory(
    lora: config.Lora | None, teacher: config.Teacher | None, callbacks: list[Callback]
) -> None:
    """UserError if a package for an adapter or a quantized teacher is missing, or if a callback
    would compress weights beside an adapter."""
    if teacher is not None and teacher.quantize is not None:
        frozen_weights.check_torchao("teacher.quantize", teacher.quantize)
    adapters.check_installed(lora)
    for technique in compressions(callbacks) if lora is not None else ():
        raise UserError(
            f"callbacks.{technique.name} changes the student's weights, but student.lora freezes "
            "them until it is merged: set export.quantize, or compress the student of this run in "
            "another one, with student.model=RUN/student"
        )


def bind_callbacks(
    callbacks: list[Callback], tokenizer: Any, split: Dataset, columns: list[str], steps: int
) -> list[Callback]:
    """The callbacks in the order in which they act, bound to the data and the length of training.

    Args:
        callbacks: result of :func:`build_callbacks`.
        tokenizer: the student's tokenizer.
        split: the raw training split.
        columns: names of its text columns.
        steps: optimizer steps of the training.

    Raises:
        UserError: if the schedules of two techniques exclude each other.
    """
    for technique in compressions(callbacks):
        with prefix_with_key(technique.name):
            technique.bind_to_data(tokenizer, data.texts(split, columns))
    return order_callbacks(callbacks, steps)


def _build_callback(name: str, spec: dict[str, Any]) -> Callback:
    with prefix_with_key(name):
        built = targets.instantiate(f"callbacks.{name}", spec, Callback)
    if isinstance(built, Compression):
        built.name = name
    if isinstance(built, ModelCheckpoint):
        raise UserError(
            f"callbacks.{name} is a ModelCheckpoint, but a run saves checkpoints itself: set "
            "trainer.checkpoint instead"
        )
    return built


def _check_trainer(trainer: config.Trainer, name: str) -> None:
    """Check that the trainer supports a technique, which changes the student."""
    if trainer.compile:
        raise UserError(
            f"trainer.compile is true, but callbacks.{name} changes the student while it trains, "
            "and it would be compiled again and again: leave trainer.compile out"
        )
    if trainer.strategy == "fsdp":
        raise UserError(
            f"trainer.strategy is fsdp, but callbacks.{name} changes tensors that fsdp "
            "shards: set trainer.strategy=ddp, or leave it out and compress with export.quantize"
        )
