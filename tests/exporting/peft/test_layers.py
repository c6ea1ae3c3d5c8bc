"""Where PEFT's own convolution is the layer's."""

import pytest
import torch
from torch import nn

from addenda.core.site.site import site_at
from addenda.exporting.peft.layers import computes_otherwise, dimensions, is_linear, pads_otherwise, taps


def place(layer: nn.Module):
    return site_at(nn.Sequential(layer), "0")


def test_a_layer_is_told_by_its_kind():
    line, grid, flat = (place(m) for m in (nn.Conv1d(2, 4, 3), nn.Conv2d(4, 6, (3, 2), groups=2), nn.Linear(3, 2)))
    assert [dimensions(s) for s in (line, grid, flat)] == [1, 2, 0]
    assert [is_linear(s) for s in (line, grid, flat)] == [False, False, True]
    assert [taps(line), taps(grid)] == [3, 6]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, None),
        ({"stride": (1, 2)}, "both sides of stride"),
        ({"padding": "same"}, "both sides of padding"),
        ({"padding": (1, 0)}, "both sides of padding"),
        ({"groups": 2}, "groups=2"),
        ({"dilation": 2}, "dilation"),
        ({"padding": 1, "padding_mode": "circular"}, "circular"),
    ],
)
def test_what_peft_leaves_out_of_a_convolution_is_another_convolution(options, word):
    layer, x = nn.Conv2d(4, 4, 3, **options), torch.randn(1, 4, 6, 6)
    reason = computes_otherwise(place(layer))
    theirs = None
    if not isinstance(layer.padding, str) and layer.groups == 1:
        theirs = nn.functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding[0], stride=layer.stride[0])
    if word is None:
        assert reason is None and theirs is not None
        torch.testing.assert_close(theirs, layer(x))
    else:
        assert reason is not None and word in reason
        assert theirs is None or theirs.shape != layer(x).shape or not torch.allclose(theirs, layer(x))


def test_a_change_beside_a_layer_that_does_not_pad_with_zeros_sees_other_borders():
    assert "circular" in (pads_otherwise(place(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"))) or "")
    assert pads_otherwise(place(nn.Conv1d(2, 2, 3, padding=1))) is None
    assert pads_otherwise(place(nn.Linear(2, 2))) is None
