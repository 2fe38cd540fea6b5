"""The ops behind the layer: schemas, an accumulator that is exact to the bit, and a float epilogue that rounds once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels import cpu_gemm
from intscale_compile.kernels.dequantize import TOKEN_OP, WEIGHT_OP
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.w4a8_linear import reference_accumulate
from tests.support.problems import LAYOUTS, SHAPES, Problem

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


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("k", [64, 1024, 1025, 3000])
def test_both_int8_products_are_exact(k, faster, monkeypatch):
    """Without int8 instructions ``_int_mm`` is slow and sums of fp32 are taken, short enough to be exact at the extremes."""
    if not cpu_gemm.int8_product_is_exact():
        pytest.skip("_int_mm of this CPU saturates")
    monkeypatch.setattr(cpu_gemm, "float_product_is_faster", lambda: faster)
    if faster:
        monkeypatch.setattr(torch, "_int_mm", None)  # calling it would be the mistake under test
    for low, high in ((-128, 128), (-128, -127), (127, 128)):
        x, w = (torch.randint(low, high, (rows, k), dtype=torch.int8) for rows in (9, 16))
        expected = x.long() @ w.long().t()
        assert torch.equal(cpu_gemm._int8_product(x, w).long(), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cpu_gemm._int8_product(x, w).long(), expected)


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
