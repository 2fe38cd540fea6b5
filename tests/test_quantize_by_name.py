"""torchao's ``FqnToConfig`` with our configuration: modules, parameters, patterns, experts, ``Conv1D``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from tests.support.quantized import BLOCKS, QUICK, Model, quantized_names


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 32))
        self.down_proj = nn.Parameter(torch.randn(3, 32, 64))


def test_fqn_of_modules_and_parameters():
    wide = IntScaleConfig(weight_bits=8, scale_search="absmax")
    model = Model()
    quantize_(model, FqnToConfig({"lm_head": wide, "blocks.0.up.weight": QUICK, "blocks.1.up": QUICK}), filter_fn=None)
    assert quantized_names(model) == ["blocks.0.up.weight", "blocks.1.up.weight", "lm_head.weight"]
    assert model.lm_head.weight.weight_bits == 8 and model.blocks[0]["up"].weight.weight_bits == 4


def test_fqn_patterns_with_exact_names_first():
    model = Model()
    table = {
        r"re:blocks\.\d\.(up|down)": QUICK,
        "blocks.1.up": None,
        r"re:.*tiny\.weight": IntScaleConfig(group_size=32, scale_search="absmax"),
    }
    quantize_(model, FqnToConfig(table), filter_fn=None)
    assert quantized_names(model) == sorted([*(n for n in BLOCKS if n != "blocks.1.up.weight"), "tiny.weight"])
    assert model.tiny.weight.group_size == 32


def test_excluded_layer_is_not_checked():
    """A layer that the table excludes may be broken: it is not ours to refuse."""
    model = Model()
    model.blocks[1]["up"].weight.data[0, 0] = float("nan")
    quantize_(model, FqnToConfig({"blocks.1.up": None, r"re:blocks\.\d\.up": QUICK}), filter_fn=None)
    assert quantized_names(model) == ["blocks.0.up.weight"]


def test_fqn_of_stacks_of_experts():
    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(32, 3)})
    dense = model["experts"].gate_up_proj.detach().clone()
    quantize_(model, FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": QUICK}), filter_fn=None)
    assert quantized_names(model) == ["experts.down_proj", "experts.gate_up_proj"]
    stack = model["experts"].gate_up_proj
    assert stack.shape == (3, 64, 32) and torch.equal(
        stack.dequantize(), IntScaleTensor.from_hp(dense, QUICK).dequantize()
    )
    x = torch.randn(2, 32)
    assert torch.equal(F.linear(x, stack[1]), F.linear(x, IntScaleTensor.from_hp(dense[1], QUICK)))


def test_conv1d_of_transformers():
    """GPT-2's layers keep [K, N]: quantized along K all the same, and still called as x @ weight + bias."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(96, 64)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    weight, x = layer.weight.detach().clone(), torch.randn(2, 5, 64)
    model = nn.Sequential(layer)
    quantize_(model, QUICK, filter_fn=lambda module, name: isinstance(module, pytorch_utils.Conv1D))
    assert isinstance(layer.weight, IntScaleTensor) and layer.weight.shape == (64, 96)
    rows = IntScaleTensor.from_hp(weight.t(), QUICK)
    assert torch.equal(layer.weight.dequantize(), rows.dequantize().t())
    assert torch.equal(model(x), F.linear(x, rows, layer.bias.detach()))
