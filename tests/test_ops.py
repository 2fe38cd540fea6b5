"""The ops behind the layer: schemas, an accumulator that is exact to the bit, and a float epilogue that rounds once."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile import format as fmt
from intscale_compile.config import GROUP_SIZES
from intscale_compile.errors import InputError
from intscale_compile.kernels import cpu_gemm
from intscale_compile.kernels.dequantize import TOKEN_OP, WEIGHT_OP
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP, reference_accumulate
from intscale_compile.ops import KERNEL_ABI

# (group_size, scale_bits, weight_bits, scale dtype): every group size, both schedules, both scale dtypes, int8 weights.
LAYOUTS = [
    *((g, 4, 4, torch.uint8) for g in GROUP_SIZES),
    (32, 8, 4, torch.uint8),
    (128, 8, 4, torch.uint8),
    (128, 12, 4, torch.int16),
    (-1, 8, 4, torch.uint8),
    (-1, 1, 8, torch.uint8),
]
SHAPES = [(1, 5, 3), (3, 65, 200), (2, 64, 256), (17, 130, 515)]  # (M, N, K); 515 = 4 groups of 128 and 3


class Problem:
    """A weight and activations straight from integers, and their accumulator in int64: no code of the package but the
    packing.
    """

    def __init__(self, m, n, k, layout, packing="plain", extreme=False, seed=0):
        group_size, scale_bits, weight_bits, scale_dtype = layout
        generator = torch.Generator().manual_seed(seed)
        groups, padded = fmt.num_groups(k, group_size), fmt.padded_in_features(k, group_size)
        top, low = 2**scale_bits - 1, -128 if weight_bits == 8 else -8
        if extreme:
            self.codes = torch.full((n, k), low, dtype=torch.int8)
            self.codes[1::2] = -low - 1
            self.xq = torch.full((m, k), -127, dtype=torch.int8)
            self.xq[1::2] = 127
            integers = torch.full((n, groups), top)
        else:
            self.codes = torch.randint(low, -low, (n, k), dtype=torch.int8, generator=generator)
            self.xq = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
            integers = torch.randint(1, top + 1, (n, groups), generator=generator)
        per_weight = torch.stack([integers[:, (j // group_size if group_size != -1 else 0)] for j in range(k)], dim=1)
        self.integers = self.codes.long() * per_weight
        self.accumulator = self.xq.long() @ self.integers.t()
        assert self.accumulator.abs().max() < 2**31
        self.token_scale = torch.rand(m, 1, generator=generator) * 0.1 + 1e-3
        self.row_scale = torch.rand(n, 1, generator=generator) * 0.01 + 1e-4
        self.bias = torch.randn(n, generator=generator)
        padded_codes = F.pad(self.codes, (0, padded - k))
        qdata = padded_codes if weight_bits == 8 else fmt.pack_int4(padded_codes, group_size)
        scale = integers.to(scale_dtype)
        if packing == "tiled":
            qdata = fmt.tile_rows(
                qdata, fmt.code_block_columns(group_size, weight_bits), 0 if weight_bits == 8 else fmt.ZERO_BYTE
            )
            scale = fmt.tile_rows(scale, 1, 1)
        self.weight = (qdata, scale)
        self.where = (n, group_size, scale_bits, packing)

    def accumulate(self, xq=None):
        return ACCUMULATE_OP(self.xq if xq is None else xq, *self.weight, *self.where, KERNEL_ABI)

    def linear(self, dtype=torch.float32, bias=True, xq=None, token_scale=None, ste_input=None):
        return LINEAR_OP(
            self.xq if xq is None else xq,
            self.token_scale if token_scale is None else token_scale,
            *self.weight,
            self.row_scale,
            self.bias if bias else None,
            *self.where,
            dtype,
            KERNEL_ABI,
            ste_input,
        )


# --- the integer accumulator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_int8", [True, False], ids=["int8", "fallback"])
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_accumulator_is_exact(layout, packing, extreme, exact_int8, monkeypatch):
    """Bit-equal to int64, on this CPU's int8 product and on the one for CPUs whose int8 instructions saturate."""
    if not exact_int8:
        monkeypatch.setattr(cpu_gemm, "int8_product_is_exact", lambda: False)
        monkeypatch.setattr(torch, "_int_mm", None)  # calling it would be the mistake under test
    for m, n, k in SHAPES:
        problem = Problem(m, n, k, layout, packing, extreme, seed=m + n + k)
        found = problem.accumulate()
        assert found.dtype == torch.int32 and torch.equal(found.long(), problem.accumulator), (m, n, k)
        group_size = layout[0]
        reference = reference_accumulate(problem.xq, *problem.weight, n, group_size, packing)
        assert reference.dtype == torch.int32 and torch.equal(reference.long(), problem.accumulator)


@pytest.mark.parametrize("exact_int8", [True, False], ids=["int8", "fallback"])
def test_accumulator_next_to_int32_max(exact_int8, monkeypatch):
    """127 * 8 * 15 * K just below 2**31: far beyond what fp32 holds, in one row of one sign."""
    if not exact_int8:
        monkeypatch.setattr(cpu_gemm, "int8_product_is_exact", lambda: False)
    k = (2**31 - 1) // (127 * 8 * 15) // 128 * 128
    problem = Problem(2, 2, k, (128, 4, 4, torch.uint8), extreme=True)
    assert problem.accumulator.max() > 2**31 * 0.99
    assert torch.equal(problem.accumulate().long(), problem.accumulator)
    assert torch.equal(reference_accumulate(problem.xq, *problem.weight, 2, 128, "plain").long(), problem.accumulator)


def test_int8_product_check_says_something_about_this_cpu():
    cpu_gemm.int8_product_is_exact.cache_clear()
    assert cpu_gemm.int8_product_is_exact() in (True, False)
    x = torch.randint(-127, 128, (5, 700), dtype=torch.int8)
    w = torch.randint(-120, 121, (9, 700), dtype=torch.int8)
    assert torch.equal(cpu_gemm._int8_product(x, w).long(), x.long() @ w.long().t())


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[6], LAYOUTS[-1]], ids=str)
def test_leading_dimensions_and_strides(layout):
    problem = Problem(12, 33, 300, layout)
    shaped = problem.xq.reshape(2, 3, 2, 300)
    assert torch.equal(problem.accumulate(shaped), problem.accumulate().reshape(2, 3, 2, 33))
    assert torch.equal(problem.accumulate(problem.xq.t().contiguous().t()), problem.accumulate())
    assert torch.equal(problem.accumulate(shaped[:, 1]), problem.accumulate().reshape(2, 3, 2, 33)[:, 1])
    assert torch.equal(problem.accumulate(problem.xq[4]), problem.accumulate()[4])
    assert problem.accumulate(problem.xq[:0]).shape == (0, 33)


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[6], LAYOUTS[-1]], ids=str)
def test_batch_invariance(layout):
    """A token's result does not depend on the tokens beside it: any batch, any position, to the last bit."""
    problem = Problem(37, 70, 515, layout)
    together = problem.linear()
    for rows in ([0], [36], [5, 3], list(range(16)), list(range(36, -1, -1))):
        assert torch.equal(problem.linear(xq=problem.xq[rows], token_scale=problem.token_scale[rows]), together[rows])
    weight = IntScaleTensor.from_hp(torch.randn(70, 515))
    x = torch.randn(37, 515)
    whole = F.linear(x, weight)
    for m in (1, 2, 7, 16, 36):
        assert torch.equal(F.linear(x[:m], weight), whole[:m])


# --- the float ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogue_is_within_one_ulp_of_float64(dtype, bias):
    """float(acc) * token_scale * row_scale + bias rounds in fp32, then once to the output dtype."""
    problem = Problem(17, 130, 515, LAYOUTS[2])
    exact = problem.accumulator.double() * problem.token_scale.double() * problem.row_scale.double().t()
    # Before the sum with the bias the product carries three roundings of fp32; cancellation may leave them visible.
    slack = exact.abs() * 2.0**-22
    if bias:
        exact = exact + problem.bias.double()
    found = problem.linear(dtype, bias)
    assert found.dtype == dtype
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)
    error = (found.double() - exact).abs()
    assert (error <= (ulp + (slack if bias or dtype == torch.float32 else 0))).all()
    if dtype != torch.float32:  # rounded once: nearly all values are the nearest of their dtype
        assert (found == exact.to(dtype)).float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizer_is_the_documented_one(dtype):
    x = torch.randn(40, 333).to(dtype)
    xq, token_scale = QUANTIZE_OP(x)
    assert xq.dtype == torch.int8 and token_scale.dtype == torch.float32 and token_scale.shape == (40, 1)
    largest = x.double().abs().amax(-1, keepdim=True)
    assert ((token_scale.double() - largest / 127).abs() <= largest / 127 * 2**-22).all()
    assert (xq.abs().amax(-1) == 127).all(), "the largest entry of a row uses the whole range"
    error = (xq.double() * token_scale.double() - x.double()).abs()
    assert (error <= token_scale.double() * (0.5 + 1e-4)).all()


def test_quantizer_of_a_row_at_the_ends_of_fp32():
    x = torch.tensor([[3.4e38, -3.4e38, 0.0], [1e-45, 0.0, 0.0], [1e-30, -1e-30, 5e-31], [0.0, -0.0, 0.0]])
    xq, token_scale = QUANTIZE_OP(x)
    assert torch.isfinite(token_scale).all() and (token_scale > 0).all()
    assert xq[0].tolist() == [127, -127, 0] and xq[1].tolist() == [0, 0, 0] and xq[3].tolist() == [0, 0, 0]
    assert (
        (xq.double() * token_scale - x.double()).abs() <= x.double().abs().amax(-1, keepdim=True) / 254 + 1e-30
    ).all()


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("scale_bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_stay_in_their_row(bad, packing, scale_bits):
    weight = IntScaleTensor.from_hp(torch.randn(70, 300), IntScaleConfig(scale_bits=scale_bits, packing_format=packing))
    x, bias = torch.randn(6, 300), torch.randn(70)
    clean = F.linear(x, weight, bias)
    x[1, 7], x[4, 0], x[4, 299] = bad, bad, 1e38
    found = F.linear(x, weight, bias)
    others = [0, 2, 3, 5]
    assert found[[1, 4]].isnan().all() and torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_give_exact_zeros(dtype):
    weight = IntScaleTensor.from_hp(torch.randn(70, 300))
    x = torch.randn(3, 300).to(dtype)
    x[1] = 0
    y = F.linear(x, weight)
    assert not y[1].any() and y[0].any()
    bias = torch.randn(70).to(dtype)
    assert torch.equal(F.linear(x, weight, bias)[1], bias)


# --- dequantize -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dequantize_weight_rounds_once(layout, packing):
    """fp32(code * scale * row scale) from fp64, so exactly one rounding."""
    problem = Problem(1, 65, 200, layout, packing)
    n, group_size, _, _ = problem.where
    found = WEIGHT_OP(*problem.weight, problem.row_scale, n, 200, group_size, packing, torch.float32)
    assert torch.equal(found, (problem.integers.double() * problem.row_scale.double()).float())


def test_dequantize_per_token():
    x = torch.randn(4, 100)
    xq, token_scale = QUANTIZE_OP(x)
    assert torch.equal(TOKEN_OP(xq, token_scale, torch.float32), xq.float() * token_scale)
    assert TOKEN_OP(xq, token_scale, torch.bfloat16).dtype == torch.bfloat16


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


@pytest.mark.parametrize("shape, layout, packing", CHECKED, ids=CHECK_IDS)
def test_opcheck_accumulate(shape, layout, packing):
    problem = Problem(*shape, layout, packing)
    torch.library.opcheck(ACCUMULATE_OP, (problem.xq, *problem.weight, *problem.where, KERNEL_ABI))


@pytest.mark.parametrize("shape, layout, packing", CHECKED, ids=CHECK_IDS)
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


@pytest.mark.parametrize("shape, layout, packing", [CHECKED[0], CHECKED[2], CHECKED[-1]], ids=str)
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


@pytest.mark.parametrize("shape, layout, packing", CHECKED, ids=CHECK_IDS)
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


# --- the cache of unpacked weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[6]], ids=["fold", "accumulate"])
@pytest.mark.parametrize("part", [0, 1], ids=["codes", "scales"])
def test_cache_follows_changes_of_the_parts(layout, part):
    """Codes are unpacked once and kept; a change in place of either stored tensor must be seen by the next call."""
    problem, other = Problem(2, 64, 256, layout), Problem(2, 64, 256, layout, seed=1)
    assert torch.equal(problem.accumulate().long(), problem.accumulator)
    problem.weight[part].copy_(other.weight[part])
    changed = reference_accumulate(problem.xq, *problem.weight, 64, layout[0], "plain")
    assert not torch.equal(changed.long(), problem.accumulator)
    assert torch.equal(problem.accumulate(), changed)


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("scale_bits", [4, 8])
@pytest.mark.parametrize("packing", ["plain", "tiled"])
def test_cache_follows_changes_of_the_weight(packing, scale_bits, inference):
    """Through copy_ of the whole (load_state_dict) and of a slice (a loader of shards), also of inference tensors.

    Autograd's version counters see neither: the copy happens below it, and slices of the parts have their own.
    """
    config = IntScaleConfig(scale_bits=scale_bits, packing_format=packing, scale_search="absmax")
    with torch.inference_mode(inference):
        weight, second, third = (IntScaleTensor.from_hp(torch.randn(128, 256), config) for _ in range(3))
        x = torch.randn(2, 256)
        F.linear(x, weight)
        weight.copy_(second)
        assert torch.equal(F.linear(x, weight), F.linear(x, second))
        weight[64:].copy_(third[64:])
        assert torch.equal(F.linear(x, weight), torch.cat([F.linear(x, second)[:, :64], F.linear(x, third)[:, 64:]], 1))
        kept = weight[:64]
        F.linear(x, kept)
        weight.copy_(third)
        assert torch.equal(F.linear(x, kept), F.linear(x, third)[:, :64]), "a view that was used before the change"


def test_cache_follows_load_state_dict():
    layers = [torch.nn.Linear(256, 64) for _ in range(2)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(IntScaleTensor.from_hp(layer.weight.detach()), requires_grad=False)
    x = torch.randn(2, 256)
    layers[0](x)
    counted = layers[0].weight.qdata._version
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[0].weight.qdata._version > counted, "compiled graphs look at this counter too"


def test_cache_is_used_and_freed():
    problem = Problem(2, 64, 256, LAYOUTS[2])
    problem.accumulate()
    kept = cpu_gemm._unpacked[problem.weight[0]]
    problem.accumulate()
    assert cpu_gemm._unpacked[problem.weight[0]] is kept
    gc.collect()
    before = len(cpu_gemm._unpacked)
    del problem
    gc.collect()
    assert len(cpu_gemm._unpacked) == before - 1, "unpacked weights must not outlive the weight"


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
