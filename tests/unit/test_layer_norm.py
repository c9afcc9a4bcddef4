"""A layer that normalises, spelled out: the same numbers."""

import pytest
import torch
from torch import nn

from distill.packing import layer_norm


@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-12}, {"bias": False}, {"elementwise_affine": False}], ids=str
)
def test_it_is_the_same_function(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, **options))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    input_BD = 100 + torch.randn(5, 3, 8)
    wanted = model(input_BD)
    layer_norm.decompose_layer_norms(model)
    assert isinstance(model[1], layer_norm.DecomposedLayerNorm)
    assert torch.allclose(model(input_BD), wanted, rtol=1e-5, atol=1e-5)


def test_what_normalises_several_dimensions_stays():
    model = nn.Sequential(nn.LayerNorm((3, 8)))
    layer_norm.decompose_layer_norms(model)
    assert type(model[0]) is nn.LayerNorm
