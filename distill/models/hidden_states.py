"""Whether the blocks of a family have hidden states that models can be compared by."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.models.block_probe import block_input, output_states
from distill.models.families import family_of, stacks
from distill.models.tiny_models import tiny_config, tiny_model, tiny_outputs

_PROVEN: set[str] = set()


def check_hidden_states(config: PreTrainedConfig) -> None:
    """Prove on a tiny model that the output of each block is the input of the next.

    Raises:
        UserError: It is not, or layers share their weights.
    """
    small, _ = tiny_config(config)
    key = small.to_json_string(use_diff=False)
    if key in _PROVEN:
        return
    model = tiny_model(small)
    passes = family_of(model).passes
    if passes > 1:
        raise UserError(
            f"the architecture is {config.model_type}, but its {passes} layers are one block that "
            "runs again and again with the same weights, and loss.terms compares layers: "
            "leave it out"
        )
    for layers in stacks(model).values():
        if not _is_chain(model, layers):
            raise UserError(
                f"the architecture is {config.model_type}, but the output of one of its blocks is "
                "not the input of the next, so that blocks have no hidden states of their own: "
                "leave out loss.terms, or take a model of another family"
            )
    _PROVEN.add(key)


def _is_chain(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def enter(block: nn.Module, inputs: Any, named: Any) -> None:
        entering.append(block_input(inputs, named))

    def leave(block: nn.Module, inputs: Any, output: Any) -> None:
        leaving.append(output_states(output))

    for block in layers:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
    tiny_outputs(model)
    pairs = zip(leaving, entering[1:], strict=False)
    return all(torch.equal(left, entered) for left, entered in pairs)
