"""``w4a8_gated_linear`` on a CPU: the schema, what it refuses, and values one rounding away from float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from intscale_compile.errors import InputError
from intscale_compile.kernels.w4a8_gated import ACTIVATIONS, GATED_OP, reference_gated
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.ops import KERNEL_ABI
from tests.support.weights import Problem, make_problem

EXACT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def call(p: Problem, activation: str, dtype=torch.float32, bias: bool = True, xq=None) -> torch.Tensor:
    operands = (p.xq if xq is None else xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias if bias else None)
    return GATED_OP(*operands, activation, *p.weight_args, dtype, KERNEL_ABI)


def expected(p: Problem, activation: str, bias: bool = True) -> torch.Tensor:
    """In float64, from the exact accumulator."""
    y = p.accumulator.double() * p.token_scale.double() * p.row_scale.double().view(-1)
    gate, up = (y + p.bias.double() if bias else y).chunk(2, dim=-1)
    return EXACT[activation](gate) * up


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size,packing", [(128, "tiled"), (32, "plain"), (-1, "tiled")])
def test_values(activation, dtype, group_size, packing):
    p = make_problem(9, 2 * 77, 300, group_size, packing=packing)
    p.token_scale.mul_(0.1)  # gates from about -10 to 10
    for bias in (False, True):
        y, exact = call(p, activation, dtype, bias), expected(p, activation, bias)
        assert y.shape == (9, 77) and y.dtype is dtype
        rounded = exact.to(dtype)
        # One unit in the last place of the output; the arithmetic in fp32 adds some units of its own.
        torch.testing.assert_close(y, rounded, rtol=max(torch.finfo(dtype).eps, 2.0**-20), atol=2.0**-18)
        oracle = reference_gated(
            p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias if bias else None, activation,
            *p.weight_args[:2], p.weight_args[3], dtype,
        )  # fmt: skip
        assert torch.equal(y, oracle)


def test_rounds_once():
    """Closer to float64 than activating and multiplying an output that was rounded already."""
    p = make_problem(64, 256, 256, 128)
    p.token_scale.mul_(0.1)
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias, *p.weight_args)
    gate, up = LINEAR_OP(*operands, torch.bfloat16, KERNEL_ABI).chunk(2, dim=-1)
    exact = expected(p, "silu")
    errors = [(y.double() - exact).norm() for y in (call(p, "silu", torch.bfloat16), F.silu(gate) * up)]
    assert errors[0] < 0.7 * errors[1]


def test_leading_dimensions_and_no_rows():
    p = make_problem(12, 2 * 64, 128, 128)
    y = call(p, "silu")
    shaped = GATED_OP(
        p.xq.view(3, 4, 128), p.token_scale.view(3, 4, 1), p.qdata, p.scale, p.row_scale, p.bias, "silu", *p.weight_args,
        torch.float32, KERNEL_ABI,
    )  # fmt: skip
    assert torch.equal(shaped, y.view(3, 4, 64))
    empty = dataclasses.replace(p, xq=p.xq[:0], token_scale=p.token_scale[:0])
    assert call(empty, "silu").shape == (0, 64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    p = make_problem(5, 128, 128, 128, packing="tiled")
    arguments = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias, activation, *p.weight_args)
    torch.library.opcheck(GATED_OP, (*arguments, torch.bfloat16, KERNEL_ABI))
    torch.library.opcheck(GATED_OP, (*arguments, torch.float32, KERNEL_ABI, True))


def test_refuses():
    p = make_problem(2, 128, 128, 128)
    with pytest.raises(InputError, match="'relu'"):
        call(p, "relu")
    odd = make_problem(2, 65, 128, 128)
    with pytest.raises(InputError, match="65 output features"):
        call(odd, "silu")
    with pytest.raises(InputError, match="int8"):
        call(p, "silu", xq=p.xq.float())
