"""Small quantized models to save, and the comparison of states."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor

QUICK = IntScaleConfig(scale_search="absmax")


def model_of(config=QUICK, features=200, rows=70):
    model = nn.Sequential(nn.Linear(features, rows), nn.LayerNorm(rows), nn.Linear(rows, 32, bias=False))
    quantize_(model, config)
    return model


def assert_same_state(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        if isinstance(tensor, IntScaleTensor):
            assert repr(found[name]) == repr(tensor)
            for part in tensor.data_names:
                assert torch.equal(getattr(found[name], part), getattr(tensor, part)), (name, part)
        else:
            assert torch.equal(found[name], tensor), name
