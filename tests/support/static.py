"""Layers whose weights are rotated or have a static activation scale, as calibration leaves them."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels.hadamard import hadamard_transform

FORMATS = {
    "group": IntScaleConfig(group_size=32),
    "wide-scales": IntScaleConfig(group_size=32, scale_bits=8),
    "channel": IntScaleConfig(group_size=-1),
    "w8a8": IntScaleConfig(weight_bits=8),
}


def prepared(
    weight: Tensor,
    rotation: int = 0,
    static: Union[float, Tensor, None] = None,
    config: Optional[IntScaleConfig] = None,
) -> IntScaleTensor:
    """``weight`` ``[N, K]`` or ``[E, N, K]``, rotated and quantized, with a static activation scale."""
    rotated = hadamard_transform(weight, rotation) if rotation else weight
    tensor = IntScaleTensor.from_hp(rotated, config or FORMATS["group"])
    return tensor.with_rotation(rotation).with_activation_scale(static)


class Siblings(nn.Module):
    """Linears that read one activation of 96 features; one rotation and one static scale for each, or for all."""

    def __init__(self, rotation=0, static=None, sizes=(64, 32, 32), bias=False, config=None):
        super().__init__()
        count = len(sizes)
        rotations = rotation if isinstance(rotation, tuple) else (rotation,) * count
        statics = static if isinstance(static, tuple) else (static,) * count
        self.parts = nn.ModuleList(nn.Linear(96, n, bias=bias) for n in sizes)
        for part, r, s in zip(self.parts, rotations, statics):
            part.weight = nn.Parameter(prepared(part.weight.detach(), r, s, config), requires_grad=False)
        self.requires_grad_(False)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def outlying(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An activation with outliers in a few features."""
    x = torch.randn(shape)
    x[..., 3::37] *= 20.0
    return x.to(dtype)
