"""Quantized random weights, and their comparison with dense results."""

from __future__ import annotations

import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor

PACKINGS = ("plain", "tiled")


def make(*shape, packing="plain", dtype=torch.float32, **fields):
    """A quantized random weight; scales differ from group to group and row to row."""
    weight = torch.randn(*shape) * torch.rand(*shape[:-1], 1).add(0.1)
    weight = weight * torch.rand(shape[-1] // 32 + 1).add(0.2).repeat_interleave(32)[: shape[-1]]
    return IntScaleTensor.from_hp(
        weight.to(dtype), IntScaleConfig(packing_format=packing, scale_search="absmax", **fields)
    )


def assert_same(found, wanted):
    """Compare a quantized result (or a tuple of them) with the dense one, shape, dtype and every bit."""
    if isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert_same(one, other)
        return
    assert isinstance(found, IntScaleTensor), type(found)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel():
        found.validate()
    assert torch.equal(found.dequantize(), wanted)


def module(**fields):
    layer = nn.Linear(256, 64)
    layer.weight = nn.Parameter(make(64, 256, **fields), requires_grad=False)
    return layer
