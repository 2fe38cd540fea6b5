"""Autocast: a quantized linear returns the autocast dtype, as ``F.linear`` does, in eager mode and by both doors."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig
from intscale_compile.kernels.integer.attention import PRODUCT_OP
from intscale_compile.tensors.intscale_tensor import IntScaleTensor
from intscale_compile.tensors.linear import linear


class Block(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.inside = inside
        self.requires_grad_(False)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.inside or torch.is_autocast_enabled("cpu")):
            return self.o(torch.relu(self.q(x) * self.k(x)))


@pytest.mark.parametrize("inside", [False, True])
def test_both_doors(inside):
    torch._dynamo.reset()
    model, x = Block(inside), torch.randn(5, 64)
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        eager = quantized(x)
        plain, tensor = (
            torch.compile(m, backend="intscale", fullgraph=True, options={"cpp.simdlen": 1})(x)
            for m in (model, quantized)
        )
    assert eager.dtype == plain.dtype == tensor.dtype == torch.bfloat16
    assert torch.equal(plain, tensor)
    torch.testing.assert_close(plain, eager, rtol=0.02, atol=0.02)


def test_activation_is_not_rounded_before_it_is_quantized():
    weight, x = IntScaleTensor.from_hp(torch.randn(32, 64), IntScaleConfig()), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert torch.equal(y, linear(x, weight).bfloat16())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_products_of_integer_models_stay_exact(dtype):
    a, b = torch.randint(-127, 128, (4, 1000)).to(dtype), torch.randint(-127, 128, (1000, 8)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PRODUCT_OP(a, b), a.long() @ b.long())


def test_addmm_adds_the_bias_before_it_rounds():
    """As the compiled graph does; GPT-2's ``Conv1D`` in bfloat16."""
    weight = IntScaleTensor.from_hp(torch.randn(32, 64, dtype=torch.bfloat16), IntScaleConfig())
    x, bias = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    assert torch.equal(torch.addmm(bias, x, weight.t()), linear(x, weight, bias))
    column = torch.randn(5, 1, dtype=torch.bfloat16)
    assert torch.equal(torch.addmm(column, x, weight.t()), linear(x, weight) + column)
