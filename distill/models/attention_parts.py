"""Queries, keys and values of a block, also where one layer computes all three."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.models.families import stack_of
from distill.remote_code.modeling import in_out_features


@dataclass(frozen=True)
class AttentionPart:
    """The queries, the keys or the values of a block, of all heads.

    Args:
        layer: the layer that computes them.
        width: their number of features.
        groups: the layer's features are this many equal groups; 1 unless they are interleaved.
        start: first feature of the part in each group.
        end: the feature after the last.
    """

    layer: nn.Module
    width: int
    groups: int
    start: int
    end: int

    def select(self, output: Tensor) -> Tensor:
        """These features of an output of the layer, (..., width)."""
        if output.shape[-1] == self.width:
            return output
        return output.unflatten(-1, (self.groups, -1))[..., self.start : self.end].flatten(-2)


def attention_parts(
    model: PreTrainedModel, block: nn.Module
) -> tuple[AttentionPart, AttentionPart, AttentionPart]:
    """Queries, keys and values of a block, before any rotary position embedding.

    Raises:
        UserError: They are not outputs of linear layers.
    """
    attention = stack_of(model, block).attention
    if attention is None:
        raise UserError(
            f"the block is a {type(block).__name__}, but attention relations need queries, keys "
            "and values that are outputs of linear layers: leave this term out, or use hidden "
            "states in its place"
        )
    layers = [
        block.get_submodule(name) for name in (attention.query, attention.key, attention.value)
    ]
    rows = in_out_features(layers[0])[1]
    if not attention.fused:
        widths = [in_out_features(layer)[1] for layer in layers]
        parts = [
            AttentionPart(layer, width, 1, 0, width)
            for layer, width in zip(layers, widths, strict=True)
        ]
        return parts[0], parts[1], parts[2]
    groups = rows // (attention.head_width * (attention.shared + 2))
    sizes = [attention.head_width * size for size in (attention.shared, 1, 1)]
    repeats = groups if attention.fused == "interleaved" else 1
    if repeats == 1:
        sizes = [groups * size for size in sizes]
    starts = (0, sizes[0], sizes[0] + sizes[1])
    parts = [
        AttentionPart(layers[0], repeats * size, repeats, start, start + size)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return parts[0], parts[1], parts[2]
