"""A student as it was built -> the form that compression gave it, for its weights to fit."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.compress import fake_quant, structure
from distill.remote_code import modeling

log = logging.getLogger("distill")


def strip_quantization(model: PreTrainedModel, what: str) -> None:
    """Make a model from a folder ready to train: what its record says of stored weights and inputs would not hold for long.

    Widths and factors stay. Its weights begin where they were stored, on a grid or at zero, and leave it.
    """
    described = modeling.compression_of(model.config)
    passing = [part for part in ("weights", "activations", "sparse") if described.get(part)]
    for name in described.get("activations", {}):
        layer = model.get_submodule(name)
        layer.__class__ = Conv1D if isinstance(layer, Conv1D) else nn.Linear
        del layer.input_range
    if passing:
        model.config.compression = {
            part: said for part, said in described.items() if part not in passing
        }
        log.info(
            "%s: it was compressed (%s) and trains on without: name callbacks to compress it again",
            what,
            ", ".join(passing),
        )


def restore_structure(student: PreTrainedModel, described: dict[str, Any]) -> None:
    """Fewer blocks, other widths, factors and quantizers: as the config of a checkpoint, a dictionary, describes them.

    The weights that the student has are no longer of use: those of the checkpoint are to be loaded.
    """
    structure.reshape(student, described)
    compression = described.get("compression") or {}
    if compression and compression != modeling.compression_of(student.config):
        trained = {"weights", "activations"}  # quantized at every forward, as they were
        modeling.apply(
            student, {key: value for key, value in compression.items() if key not in trained}
        )
        if trained & compression.keys():
            fake_quant.attach_fake_quant(
                student, compression.get("weights", {}), compression.get("activations")
            )
        student.config.compression = compression
