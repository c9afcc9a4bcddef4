"""A student as it was built -> the form that compression gave it, for its weights to fit."""

from typing import Any

from transformers import PreTrainedModel

from distill.compress import quantized, structure
from distill.runtime import modeling


def rebuild(student: PreTrainedModel, described: dict[str, Any]) -> None:
    """Fewer blocks, other widths, factors and quantizers: as the config of a checkpoint, a dictionary, describes them.

    The weights that the student has are no longer of use: those of the checkpoint are to be loaded.
    """
    structure.reshape(student, described)
    compression = described.get("compression") or {}
    if compression and compression != student.config.to_dict().get("compression"):
        trained = {"weights", "activations"}  # quantized at every forward, as they were
        modeling.apply(student, {key: value for key, value in compression.items() if key not in trained})
        if trained & compression.keys():
            quantized.attach(student, compression.get("weights", {}), compression.get("activations"))
        student.config.compression = compression
