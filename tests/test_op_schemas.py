"""Schemas, fake implementations and gradients of the ops, and operands that they refuse."""

from __future__ import annotations

import pytest
import torch

from intscale_compile.errors import InputError
from intscale_compile.kernels.dequantize import TOKEN_OP, WEIGHT_OP
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP
from intscale_compile.ops import KERNEL_ABI
from tests.support.problems import LAYOUTS, Problem

# --- schemas --------------------------------------------------------------------------------------------------------

CHECKED = [
    ((3, 65, 200), LAYOUTS[0], "plain"),
    ((1, 5, 3), LAYOUTS[1], "tiled"),
    ((2, 64, 256), LAYOUTS[2], "tiled"),
    ((3, 65, 200), LAYOUTS[3], "plain"),
    ((2, 33, 130), LAYOUTS[4], "tiled"),
    ((2, 33, 130), LAYOUTS[7], "plain"),
    ((3, 65, 200), LAYOUTS[-1], "tiled"),
]
CHECK_IDS = [f"{shape}-{layout[:3]}-{packing}" for shape, layout, packing in CHECKED]
# Both packings, both widths of codes, groups and whole rows.
QUICK = (CHECKED[0], CHECKED[2], CHECKED[-1])
ALL = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=i) for case, i in zip(CHECKED, CHECK_IDS)
]


@pytest.mark.parametrize("shape, layout, packing", ALL)
def test_opcheck_accumulate(shape, layout, packing):
    problem = Problem(*shape, layout, packing)
    torch.library.opcheck(ACCUMULATE_OP, (problem.xq, *problem.weight, *problem.where, KERNEL_ABI))


@pytest.mark.parametrize("shape, layout, packing", ALL)
def test_opcheck_linear(shape, layout, packing):
    """Without gradients, with the bias and without."""
    problem = Problem(*shape, layout, packing)
    for bias in (problem.bias, None):
        arguments = (
            problem.xq,
            problem.token_scale,
            *problem.weight,
            problem.row_scale,
            bias,
            *problem.where,
            torch.bfloat16,
            KERNEL_ABI,
        )
        torch.library.opcheck(LINEAR_OP, arguments)


@pytest.mark.parametrize("shape, layout, packing", QUICK, ids=str)
def test_opcheck_linear_with_gradients(shape, layout, packing):
    """The straight-through input and the bias require grad; AOTAutograd must trace both with static and dynamic
    shapes.
    """
    problem = Problem(*shape, layout, packing)
    x = torch.randn(shape[0], shape[2], requires_grad=True)
    for bias in (problem.bias.clone().requires_grad_(), None):
        arguments = (
            problem.xq,
            problem.token_scale,
            *problem.weight,
            problem.row_scale,
            bias,
            *problem.where,
            torch.float32,
            KERNEL_ABI,
            x,
        )
        torch.library.opcheck(LINEAR_OP, arguments)


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 7), torch.randn(2, 3, 65).bfloat16(), torch.randn(9), torch.zeros(0, 4)],
    ids=lambda x: str(tuple(x.shape)),
)
def test_opcheck_quantize(x):
    torch.library.opcheck(QUANTIZE_OP, (x,))


@pytest.mark.parametrize("shape, layout, packing", ALL)
def test_opcheck_dequantize(shape, layout, packing):
    problem = Problem(*shape, layout, packing)
    n, group_size, _, _ = problem.where
    torch.library.opcheck(
        WEIGHT_OP, (*problem.weight, problem.row_scale, n, shape[2], group_size, packing, torch.bfloat16)
    )
    torch.library.opcheck(TOKEN_OP, (problem.xq, problem.token_scale, torch.float16))


def test_straight_through_gradient_of_the_op():
    problem = Problem(3, 65, 200, LAYOUTS[2])
    x, bias = torch.randn(3, 200, requires_grad=True), problem.bias.clone().requires_grad_()
    y = LINEAR_OP(
        problem.xq,
        problem.token_scale,
        *problem.weight,
        problem.row_scale,
        bias,
        *problem.where,
        torch.float32,
        KERNEL_ABI,
        x,
    )
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = WEIGHT_OP(*problem.weight, problem.row_scale, 65, 200, 128, "plain", torch.float32)
    assert torch.equal(x.grad, grad @ dense)
    assert torch.allclose(bias.grad, grad.sum(0))


# --- refusals -------------------------------------------------------------------------------------------------------


def broken(**changes):
    """Arguments of a good call with some of them exchanged."""
    problem = Problem(2, 70, 300, LAYOUTS[2])
    good = {
        "xq": problem.xq,
        "qdata": problem.weight[0],
        "scale": problem.weight[1],
        "out_features": 70,
        "group_size": 128,
        "scale_bits": 4,
        "packing": "plain",
        "abi": KERNEL_ABI,
    }
    return {**good, **changes}


BROKEN = {
    "float activation": ({"xq": torch.zeros(2, 300)}, "expected int8"),
    "too few features": ({"xq": torch.zeros(2, 128, dtype=torch.int8)}, "128 features.*384"),
    "too many features": ({"xq": torch.zeros(2, 385, dtype=torch.int8)}, "385 features.*384"),
    "int32 codes": ({"qdata": torch.zeros(70, 192, dtype=torch.int32)}, "qdata is torch.int32"),
    "3-D codes": ({"qdata": torch.zeros(1, 70, 192, dtype=torch.uint8)}, "3 dimensions"),
    "1-D codes": ({"qdata": torch.zeros(192, dtype=torch.uint8)}, "1 dimensions"),
    "wrong rows": ({"out_features": 71}, "do not describe 71 rows"),
    "wrong scales": ({"scale": torch.ones(70, 2, dtype=torch.uint8)}, "of 3 groups"),
    "wrong group size": ({"group_size": 64}, "features but|of 6 groups|of 5 groups"),
    "plain data as tiled": ({"packing": "tiled"}, "in tiled packing"),
    "other device": ({"scale": torch.ones(70, 3, dtype=torch.uint8, device="meta")}, "move them together"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_operands(name):
    changes, message = BROKEN[name]
    arguments = broken(**changes)
    meta = name == "other device"
    if not meta:
        with pytest.raises(InputError, match=message):
            ACCUMULATE_OP(**arguments)
    with pytest.raises(InputError, match=message):
        reference_check(arguments)
    row_scale, token_scale = torch.ones(70, 1), torch.ones(2, 1)
    abi = arguments.pop("abi")
    if not meta:
        with pytest.raises(InputError, match=message):
            LINEAR_OP(
                **arguments, row_scale=row_scale, token_scale=token_scale, bias=None, dtype=torch.float32, abi=abi
            )


def reference_check(arguments):
    """The check itself: a mixed-device call may be stopped by the dispatcher before it reaches the op."""
    from intscale_compile.kernels.w4a8_linear import check_operands

    check_operands(*(arguments[n] for n in ("xq", "qdata", "scale", "out_features", "group_size", "packing")))


def test_good_operands_pass_the_same_check():
    """Otherwise the refusals above could be those of a check that refuses everything."""
    reference_check(broken())
    assert ACCUMULATE_OP(**broken()).shape == (2, 70)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(2, 3, dtype=torch.int32), "int32"),
        (torch.ones(2, 3).double(), "float64"),
        (torch.tensor(1.0), "scalar"),
    ],
)
def test_quantizer_refuses(x, message):
    with pytest.raises(InputError, match=message):
        QUANTIZE_OP(x)
