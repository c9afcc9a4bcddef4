"""The student in a checkpoint: its structure, and only the tensors that are trained."""

import json
from typing import Any

from transformers import PreTrainedModel

from distill.compress.restore import restore_structure
from distill.errors import UserError
from distill.models.adapters import base_fingerprint, base_state

PREFIX = "student."  # of the student's tensors in a checkpoint


def write(student: PreTrainedModel, checkpoint: dict[str, Any]) -> None:
    """Add the student's config to a checkpoint, and drop the weights that an adapter leaves."""
    checkpoint["student_config"] = student.config.to_json_string(use_diff=False)
    if fingerprint := base_fingerprint(student):
        checkpoint["base"] = fingerprint
    frozen = {f"{PREFIX}{name}" for name in base_state(student)}
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: state[name] for name in state if name not in frozen}


def restore(student: PreTrainedModel, checkpoint: dict[str, Any]) -> None:
    """Prepare student and checkpoint for loading: the structure, and the weights left out.

    Raises:
        UserError: the weights beside an adapter are not those with which the run started.
    """
    restore_structure(student, json.loads(checkpoint["student_config"]))
    expected, actual = checkpoint.get("base", ""), base_fingerprint(student)
    if expected != actual:
        raise UserError(
            f"the weights that student.lora freezes have the SHA-256 {actual[:12]}, but the run "
            f"started with {expected[:12]}: restore the model, or start a new run"
        )
    base = {f"{PREFIX}{name}": tensor for name, tensor in base_state(student).items()}
    checkpoint["state_dict"] = base | checkpoint["state_dict"]
