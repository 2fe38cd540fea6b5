"""``IntScaleTensor``: structural operators are exact, views alias, what has no meaning is refused, products run
quantized.

"Exact" throughout: an operator followed by ``dequantize()`` is bit-equal to ``dequantize()`` followed by the operator.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import UnsupportedOpError
from tests.support.tensors import PACKINGS, assert_same, make

# --- structural operators -------------------------------------------------------------------------------------------

# 200 = 3 tiles and 8 rows; 400 = 3 groups of 128 and 16 columns.
ROWS_2D = {
    "narrow": lambda w: torch.narrow(w, 0, 64, 64),
    "narrow_method": lambda w: w.narrow(0, 128, 72),
    "narrow_keywords": lambda w: w.narrow(dim=0, start=64, length=64),
    "narrow_from_the_end": lambda w: w.narrow(-2, -200, 200),
    "slice": lambda w: w[64:192],
    "slice_to_the_end": lambda w: w[128:],
    "slice_negative": lambda w: w[-72:],
    "slice_everything": lambda w: w[:, :],
    "slice_nothing": lambda w: w[64:64],
    "split": lambda w: w.split(64),
    "stack": lambda w: torch.stack([w, w]),
    "split_dim": lambda w: torch.split(w, 128, dim=-2),
    "split_with_sizes": lambda w: w.split([64, 128, 8], 0),
    "chunk": lambda w: w[:128].chunk(2),
    "tensor_split": lambda w: w.tensor_split((64, 128)),
    "cat": lambda w: torch.cat([w, w[64:128], w]),
    "cat_whole_tiles": lambda w: torch.cat([w[:128], w]),
    "cat_dim": lambda w: torch.cat([w, w], dim=-2),
    "transpose": lambda w: w.transpose(0, 1),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "permute": lambda w: w.permute(1, 0),
    "permute_identity": lambda w: w.permute(0, -1),
    "t_twice": lambda w: w.t().t(),
    "t_narrow": lambda w: w.t().narrow(1, 64, 64),
    "t_slice": lambda w: w.t()[:, 128:],
    "t_cat": lambda w: torch.cat([w.t(), w.t()], dim=1),
    "view_same": lambda w: w.view(200, 400),
    "view_minus_one": lambda w: w.view(-1, 400),
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "t_contiguous": lambda w: w.t().contiguous(),
    "deepcopy": lambda w: copy.deepcopy(w),
    "copy": lambda w: copy.copy(w),
    "to_device": lambda w: w.to("cpu"),
    "to_bf16": lambda w: w.to(torch.bfloat16),
    "half": lambda w: w.half(),
    "to_both": lambda w: w.to("cpu", torch.bfloat16),
    "t_half": lambda w: w.t().half(),
}
PLAIN_2D = {
    "single_rows": lambda w: w[3:5],
    "strided_rows": lambda w: w[1:100:3],
    "columns": lambda w: w[:, 128:256],
    "last_columns": lambda w: w[:, 256:],
    "no_columns": lambda w: w[:, 128:128],
    "narrow_columns": lambda w: w.narrow(1, 128, 272),
    "t_columns": lambda w: w.t()[128:],
    "both": lambda w: w[7:90, 128:384],
    "split_columns": lambda w: w.split(128, dim=1),
    "split_sizes_columns": lambda w: w.split([256, 144], -1),
    "chunk_columns": lambda w: w[:, :256].chunk(2, dim=1),
    "chunk_rows": lambda w: w.chunk(3),
    "index": lambda w: w[torch.tensor([5, 0, 199, 5])],
    "index_list": lambda w: w[[3, 1]],
    "index_select": lambda w: torch.index_select(w, 0, torch.tensor([5, 0, 199])),
    "t_index_select": lambda w: w.t().index_select(1, torch.tensor([5, 0])),
    "view_as_stack": lambda w: w.view(4, 50, 400),
    "unflatten": lambda w: w.unflatten(0, (2, 100)),
}
STACK = {
    "select": lambda w: w[1],
    "select_last": lambda w: w.select(0, -1),
    "unbind": lambda w: w.unbind(),
    "unbind_dim": lambda w: torch.unbind(w, dim=-3),
    "iterate": lambda w: tuple(w),
    "slice_experts": lambda w: w[1:3],
    "strided_experts": lambda w: w[::2],
    "narrow_experts": lambda w: w.narrow(0, 1, 2),
    "slice_rows": lambda w: w[:, 64:],
    "slice_rows_of_one": lambda w: w[2, 64:128],
    "index_select_experts": lambda w: w.index_select(0, torch.tensor([2])),
    "split_experts": lambda w: w.split(2),
    "chunk_experts": lambda w: w.chunk(3),
    "cat_experts": lambda w: torch.cat([w, w[:1]]),
    "cat_rows": lambda w: torch.cat([w, w[:, :64]], dim=1),
    "transpose": lambda w: w.transpose(1, 2),
    "transpose_negative": lambda w: w.transpose(-1, -2),
    "permute": lambda w: w.permute(0, 2, 1),
    "t_select": lambda w: w.transpose(1, 2)[1],
    "t_unbind": lambda w: w.mT.unbind(0),
    "t_slice": lambda w: w.mT[1:, :, 64:],
    "merge_experts": lambda w: w.view(-1, 200),
    "reshape": lambda w: w.reshape(384, 200),
    "flatten": lambda w: w.flatten(0, 1),
    "split_rows_to_experts": lambda w: w.view(6, 64, 200),
    "clone": lambda w: w.clone(),
    "deepcopy": lambda w: copy.deepcopy(w),
    "to_bf16": lambda w: w.to(torch.bfloat16),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ROWS_2D)
def test_matrix_operator(name, packing):
    weight = make(200, 400, packing=packing)
    result = ROWS_2D[name](weight)
    assert_same(result, ROWS_2D[name](weight.dequantize()))
    first = result[0] if isinstance(result, (tuple, list)) else result
    assert first.packing_format == packing or packing == "tiled" and name == "cat"


@pytest.mark.parametrize("name", PLAIN_2D)
def test_matrix_operator_that_needs_plain_packing(name):
    weight = make(200, 400)
    assert_same(PLAIN_2D[name](weight), PLAIN_2D[name](weight.dequantize()))
    with pytest.raises(UnsupportedOpError, match="dequantize\\(\\)"):
        PLAIN_2D[name](weight.to_packing("tiled"))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", STACK)
def test_stack_operator(name, packing):
    weight = make(3, 128, 200, packing=packing)
    assert_same(STACK[name](weight), STACK[name](weight.dequantize()))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"group_size": 32},
        {"group_size": 64},
        {"group_size": 256},
        {"group_size": -1},
        {"weight_bits": 8},
        {"scale_bits": 8},
        {"amplifier": 1024},
    ],
    ids=str,
)
def test_operators_on_every_kind_of_weight(fields, packing):
    """One round of slicing and joining per layout: group scales and codes must be cut at the same places."""
    weight = make(130, 600, packing=packing, **fields)
    dense = weight.dequantize()
    assert_same(weight[64:], dense[64:])
    assert_same(torch.cat([weight[:64], weight]), torch.cat([dense[:64], dense]))
    if packing == "plain":
        assert_same(weight[1:77, 256:], dense[1:77, 256:])
        assert_same(weight[:, 256:512].t(), dense[:, 256:512].t())
    x = torch.randn(3, 600)
    assert torch.equal(F.linear(x, weight)[:, 64:], F.linear(x, weight[64:]))


def test_plain_slices_at_the_documented_alignment():
    """Groups of 32 are packed in blocks of 64: features are cut at multiples of 64 and nowhere else."""
    weight = make(8, 256, group_size=32)
    assert_same(weight[:, 64:192], weight.dequantize()[:, 64:192])
    with pytest.raises(UnsupportedOpError, match="not multiples of 64"):
        weight[:, 32:]


def test_cat_of_different_scale_dtypes_and_bits():
    narrow, wide = make(64, 128, scale_bits=4), make(64, 128, amplifier=4096)
    assert (narrow.scale.dtype, wide.scale.dtype) == (torch.uint8, torch.int16)
    for parts in ([narrow, wide], [wide, narrow]):
        joined = torch.cat(parts)
        assert_same(joined, torch.cat([p.dequantize() for p in parts]))
        assert joined.scale_bits == wide.scale_bits, (
            "too small a bound would let a kernel fold a scale that does not fit"
        )


def test_cat_of_different_packings_is_plain():
    weight = make(128, 256)
    joined = torch.cat([weight.to_packing("tiled"), weight])
    assert joined.packing_format == "plain"
    assert_same(joined, torch.cat([weight.dequantize()] * 2))


# --- views alias ----------------------------------------------------------------------------------------------------

VIEWS = {
    "narrow": lambda w: w.narrow(0, 64, 64),
    "slice": lambda w: w[64:],
    "t": lambda w: w.t(),
    "detach": lambda w: w.detach(),
    "view": lambda w: w.view(128, 256),
    "split": lambda w: w.split(64)[1],
    "t_slice": lambda w: w.t()[:, :64],
    "data": lambda w: w.data,
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", VIEWS)
def test_copy_into_a_view_writes_the_parent(name, packing):
    """How tensor-parallel loaders fill a merged weight: narrow(...).copy_(shard)."""
    weight, other = make(128, 256, packing=packing), make(128, 256, packing=packing)
    dense, before = weight.dequantize(), weight.dequantize()
    VIEWS[name](weight).copy_(VIEWS[name](other))
    VIEWS[name](dense).copy_(VIEWS[name](other.dequantize()))
    assert torch.equal(weight.dequantize(), dense) and not torch.equal(dense, before)


def test_select_of_a_stack_writes_the_parent():
    stack, other = make(3, 64, 128), make(64, 128)
    dense = stack.dequantize()
    stack[1].copy_(other)
    dense[1] = other.dequantize()
    assert torch.equal(stack.dequantize(), dense)
    stack[0:1] = stack[2:3].clone()
    dense[0] = dense[2]
    assert torch.equal(stack.dequantize(), dense)


@pytest.mark.parametrize("name", ["clone", "deepcopy", "to_bf16", "cat"])
def test_copies_do_not_alias(name):
    weight = make(200, 400)
    copied = ROWS_2D[name](weight)
    before = copied.dequantize()
    weight.copy_(make(200, 400))
    assert torch.equal(copied.dequantize(), before)


def test_copy_between_packings():
    weight, other = make(100, 128), make(100, 128)
    weight.copy_(other.to_packing("tiled"))
    assert weight.packing_format == "plain" and torch.equal(weight.dequantize(), other.dequantize())


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "add": lambda w: w + 1,
    "mul": lambda w: 2 * w,
    "inplace": lambda w: w.add_(2),
    "relu": lambda w: torch.relu(w),
    "sum": lambda w: w.sum(),
    "equal": lambda w: w == w,
    "zeros_like": lambda w: torch.zeros_like(w),
    "init": lambda w: nn.init.normal_(w),
    "one_row": lambda w: w[3],
    "one_entry": lambda w: w[3, 4],
    "mask": lambda w: w[torch.ones(128, dtype=torch.bool)],
    "index_columns": lambda w: w[:, torch.tensor([0, 1])],
    "odd_columns": lambda w: w[:, 3:],
    "strided_columns": lambda w: w[:, ::2],
    "unsqueeze": lambda w: w[:, None],
    "unbind": lambda w: w.unbind(0),
    "stack_last": lambda w: torch.stack([w, w], dim=1),
    "flat": lambda w: w.view(-1),
    "other_matrix": lambda w: w.view(256, 128),
    "reshape_transposed": lambda w: w.t().reshape(128, 256),
    "cat_columns": lambda w: torch.cat([w, w], dim=1),
    "cat_plain": lambda w: torch.cat([w, torch.zeros(1, 256)]),
    "cat_plain_first": lambda w: torch.cat([torch.zeros(1, 256), w]),
    "cat_other_groups": lambda w: torch.cat([w, make(128, 256, group_size=64)]),
    "bad_split": lambda w: w.split([64, 65]),
    "short_split": lambda w: w.split([64, 1]),
    "to_int": lambda w: w.to(torch.int8),
    "copy_from_dense": lambda w: w.copy_(torch.zeros(128, 256)),
    "copy_to_dense": lambda w: torch.zeros(128, 256).copy_(w),
    "copy_other_shape": lambda w: w.copy_(make(64, 256)),
    "copy_other_groups": lambda w: w.copy_(make(128, 256, group_size=64)),
    "copy_wider_scales": lambda w: w.copy_(make(128, 256, scale_bits=8)),
    "copy_transposed": lambda w: w.copy_(make(256, 128).t()),
    "left_operand": lambda w: w @ torch.zeros(256, 2),
    "not_transposed": lambda w: torch.zeros(2, 128) @ w,
    "two_weights": lambda w: F.linear(w, w),
    "dense_weight": lambda w: F.linear(w, torch.zeros(5, 256)),
    "scaled_addmm": lambda w: torch.addmm(torch.zeros(128), torch.zeros(2, 256), w.t(), alpha=2),
    "mm_out": lambda w: torch.mm(torch.zeros(2, 256), w.t(), out=torch.zeros(2, 128)),
    "einsum": lambda w: torch.einsum("mk,nk->nm", torch.zeros(2, 256), w),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_operator_names_the_mend(name, packing):
    """Refused with our type, and with something to do after the semicolon; the weight stays as it was."""
    weight = make(128, 256, packing=packing)
    before = weight.dequantize()
    with pytest.raises(UnsupportedOpError, match=r"IntScaleTensor: .+; \w+.+\."):
        REFUSED[name](weight)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize(
    "name, refused",
    {
        "swap_experts": lambda w: w.transpose(0, 1),
        "permute": lambda w: w.permute(1, 0, 2),
        "select_row": lambda w: w[:, 3],
        "unbind_rows": lambda w: w.unbind(1),
        "bmm_over_rows": lambda w: torch.bmm(torch.zeros(3, 1, 128), w),
    }.items(),
)
def test_refused_operator_on_a_stack(name, refused):
    with pytest.raises(UnsupportedOpError, match="; "):
        refused(make(3, 128, 256))


def test_tiled_slices_must_be_whole_tiles():
    weight = make(200, 256, packing="tiled")
    for refused in (lambda: weight[3:], lambda: weight[:100], lambda: weight[::2], lambda: weight[:, 128:]):
        with pytest.raises(UnsupportedOpError, match="to_packing\\('plain'\\)"):
            refused()


@pytest.mark.parametrize("start, length", [(0, 129), (100, 29), (-129, 1), (-10, 11)])
def test_narrow_out_of_range(start, length):
    """torch.narrow raises where slicing would clamp; a loader that asks for too much must hear of it."""
    with pytest.raises(IndexError, match="narrow"):
        make(128, 128).narrow(0, start, length)


@pytest.mark.parametrize("transposed", [False, True])
def test_scaling_in_place_scales_the_rows(transposed):
    """RWKV divides weights by powers of two in its first call; compiled graphs and eager calls see it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).requires_grad_(False)
    tensor = IntScaleTensor.from_hp(layer.weight, IntScaleConfig(group_size=32))
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    x = torch.randn(3, 64)
    y, dense = layer(x) - layer.bias, layer.weight.dequantize()
    weight = layer.weight.t() if transposed else layer.weight
    with torch.no_grad():
        assert weight.div_(4) is weight
        assert torch.equal(layer(x) - layer.bias, y / 4) or (layer(x) - layer.bias - y / 4).abs().max() < 1e-6
        weight.mul_(torch.tensor(8.0))
    assert torch.equal(layer.weight.dequantize(), dense * 2)
    layer.weight.validate()
    before = layer.weight.per_tensor_scale.clone()
    for factor in (0, -1.0, math.inf, math.nan, 1e-60, torch.ones(64)):
        with torch.no_grad(), pytest.raises(UnsupportedOpError, match="in place|not positive and finite"):
            layer.weight.mul_(factor)
    assert torch.equal(layer.weight.per_tensor_scale, before)
