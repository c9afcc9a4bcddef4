"""What must hold before a technique changes a model of a family, proven on a tiny model of it.

| technique | law |
|---|---|
| `layers` | a model of some layers has the outputs of the full one whose other layers are skipped |
| `hidden_states` | the output of each block is the input of the next |
| `attention` | queries, keys and values are outputs of linear layers, whose rows act by head |
| `neurons` | a model without some neurons has the outputs of one whose same neurons are zero |
| `heads` | the same of heads; with `unequal` numbers of them in each block, `unequal_heads` |
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.compress import structure, widths
from distill.compress.structure import Groups
from distill.errors import UserError
from distill.models.attention_parts import attention_parts
from distill.models.families import blocks, examine_family, family_of, stacks
from distill.models.hidden_states import check_hidden_states
from distill.models.layer_proof import shorten_config
from distill.models.tiny_models import tiny_config, tiny_model, tiny_outputs
from distill.remote_code.modeling import CompressionConfig, build_compressed_layers

__all__ = ["TECHNIQUES", "check_separate_layers", "check_structure"]

TECHNIQUES = ("layers", "hidden_states", "attention", "neurons", "heads", "unequal_heads")
_PRECISION = 1e-5  # of equal outputs, relative to the largest: some norms compute in float32
_EFFECT = 1e-3  # least change of the outputs by which a proof counts
_OTHERS = "leave this technique out, or take a model of another family"
_PROVEN: set[str] = set()


def check_structure(
    config: PreTrainedConfig, techniques: Iterable[str], share: float = 0.5
) -> None:
    """Prove that techniques can be applied to the models of a config, before one is loaded.

    Args:
        config: Of a teacher or a student; compression in it is ignored.
        techniques: Of TECHNIQUES.
        share: The share of the neurons or heads that is to be removed.

    Raises:
        UserError: A law does not hold; the sentence says which.
    """
    for technique in techniques:
        key = f"{technique} {share} {config.to_json_string(use_diff=False)}"
        if key not in _PROVEN:
            _prove(config, technique, share)
            _PROVEN.add(key)


def _prove(config: PreTrainedConfig, technique: str, share: float) -> None:
    if technique == "layers":
        _prove_some_layers(config)
    elif technique == "hidden_states":
        check_hidden_states(config)
    elif technique == "attention":
        model = tiny_model(tiny_config(config)[0])
        for block in blocks(model):
            attention_parts(model, block)
    elif technique == "neurons":
        _prove_groups(config, structure.neurons, True, share)
    elif technique in ("heads", "unequal_heads"):
        _prove_groups(config, structure.heads, technique == "unequal_heads", share)
    else:
        raise ValueError(f"{technique} is none of {', '.join(TECHNIQUES)}")


def _prove_some_layers(config: PreTrainedConfig) -> None:
    """All layers but one of each list, the last of it."""
    model = tiny_model(tiny_config(config)[0])
    family, start = family_of(model), 0
    selected: list[int] = []
    counts = [len(layers) for layers in stacks(model).values()]
    for count in [family.passes] if family.passes > 1 else counts:
        selected += range(start, start + max(1, count - 1))
        start += count
    shorten_config(config, selected)


def check_separate_layers(config: PreTrainedConfig) -> None:
    """UserError if layers share their weights, so that none can be removed."""
    passes = examine_family(config).passes
    if passes > 1:
        raise UserError(
            f"the architecture is {config.model_type}, but its {passes} layers are one block that "
            "runs again and again with the same weights, and none can be removed: "
            "set student.layers, which lowers the number of runs"
        )


def _prove_groups(
    config: PreTrainedConfig,
    find: Callable[[PreTrainedModel, nn.Module], Groups],
    unequal: bool,
    share: float,
) -> None:
    """Prove that removed neurons or heads equal masked ones, also once saved and built again.

    Args:
        config: the config of the student.
        find: :func:`structure.neurons` or :func:`structure.heads`.
        unequal: whether blocks lose different numbers.
        share: the share that is removed.

    Raises:
        UserError: the law does not hold.
    """
    removed = tiny_model(tiny_config(config)[0])
    before = tiny_outputs(removed)
    masks = _masks([find(removed, block).count for block in blocks(removed)], unequal, share)
    if all(mask.all() for mask in masks):
        return
    masked = copy.deepcopy(removed)
    for block, mask in zip(blocks(masked), masks, strict=True):
        structure.zero_groups(find(masked, block), mask)
    expected = tiny_outputs(masked)
    for block, mask in zip(blocks(removed), masks, strict=True):
        structure.remove_groups(find(removed, block), mask)
    try:
        outputs = [tiny_outputs(_record(removed)), tiny_outputs(_rebuild(removed))]
    except (RuntimeError, ValueError, IndexError):  # a view of the wrong size, for example
        outputs = []
    scale = float(expected.abs().max())
    equal = outputs and all((each - expected).abs().max() <= _PRECISION * scale for each in outputs)
    if not equal or (expected - before).abs().max() < _EFFECT * scale:
        kind = "neurons" if find is structure.neurons else "heads"
        numbers = " in unequal numbers" if unequal and kind == "heads" else ""
        raise UserError(
            f"the architecture is {config.model_type}, but with its settings a model without some "
            f"{kind}{numbers} has other outputs than one whose same {kind} are zero: {_OTHERS}"
        )


def _masks(counts: list[int], unequal: bool, share: float) -> list[Tensor]:
    masks = []
    for position, count in enumerate(counts):
        removed = min(round(share * count), count - 1) - (position % 2 if unequal else 0)
        mask = torch.ones(count, dtype=torch.bool)
        mask[: max(removed, 0)] = False
        masks.append(mask.roll(1))
    return masks


def _record(model: PreTrainedModel) -> PreTrainedModel:
    """Write the widths of a pruned model to its config."""
    compression = CompressionConfig(shapes=widths.update_config(model))
    compression.attributes = widths.head_attributes(model, compression.shapes)
    compression.write_to(model.config)
    return model


def _rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """The model as an export of it is built and loaded."""
    config = copy.deepcopy(model.config)
    rebuilt = tiny_model(config)
    build_compressed_layers(rebuilt, CompressionConfig.from_config(config))
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt
