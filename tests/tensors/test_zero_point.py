"""Zero points in products: bit for bit an int64 sum of (code - zero point) * scale * activation, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor, explain
from intscale_compile.compile.binding import bind, rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.errors import InputError
from intscale_compile.kernels.dequantize import WEIGHT_OP
from intscale_compile.kernels.quantize_per_token import quantize_per_token_aten
from intscale_compile.kernels.w4a8_gated import GATED_OP, gate
from intscale_compile.kernels.w4a8_grouped import GROUPED_OP, INPUT_GRAD_OP
from intscale_compile.kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP, reference_accumulate
from intscale_compile.ops import KERNEL_ABI
from tests.support.compiled import rewritten
from tests.support.experts import make_grouped
from tests.support.weights import make_problem

GROUP_SIZES = (32, 64, 128, 256, -1)


def accumulate(p, zero_point=None):
    zero_point = p.zero_point if zero_point is None else zero_point
    return ACCUMULATE_OP(p.xq, p.qdata, p.scale, *p.weight_args, KERNEL_ABI, zero_point)


def linear_arguments(p, bias=None, dtype=torch.float32, ste_input=None):
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, bias)
    return (*operands, *p.weight_args, dtype, KERNEL_ABI, ste_input, False, p.zero_point)


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("scale_bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_accumulator_is_exact(group_size, scale_bits, packing):
    """3 bits fold, 4 would leave int8; ragged and extreme values."""
    for values, shape in (("random", (5, 77, 296)), ("extreme", (3, 65, 512)), ("random", (1, 1, 31))):
        p = make_problem(*shape, group_size, scale_bits, packing, values=values, asymmetric=True)
        assert torch.equal(accumulate(p).long(), p.accumulator), (values, shape)
        weight = (p.qdata, p.scale, p.weight_args[0], group_size, packing, p.zero_point)
        assert torch.equal(reference_accumulate(p.xq, *weight).long(), p.accumulator)
        dense = WEIGHT_OP(
            p.qdata, p.scale, torch.ones_like(p.row_scale), p.weight_args[0], shape[2], group_size, packing, torch.float32,
            p.zero_point,
        )  # fmt: skip
        assert torch.equal((p.xq.double() @ dense.double().t()).long(), p.accumulator)


def test_scales_of_sixteen_bits():
    p = make_problem(5, 40, 520, 128, 11, scale_dtype=torch.int16, asymmetric=True)
    assert torch.equal(accumulate(p).long(), p.accumulator)


def test_new_zero_points_are_seen():
    """The unpacked weight that a CPU keeps follows the zero points: written in place, exchanged, left out."""
    p = make_problem(5, 77, 296, 128, 8, asymmetric=True)
    first = accumulate(p)
    assert not torch.equal(ACCUMULATE_OP(p.xq, p.qdata, p.scale, *p.weight_args, KERNEL_ABI), first)
    assert torch.equal(accumulate(p), first)
    assert not torch.equal(accumulate(p, p.zero_point.flip(0).contiguous()), first)
    p.zero_point.zero_()
    assert torch.equal(accumulate(p), ACCUMULATE_OP(p.xq, p.qdata, p.scale, *p.weight_args, KERNEL_ABI))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: z.int(), "zero_point is torch.int32"),
        (lambda z: z[:, :1], r"expected int8 or int16 \(77, 3\)"),
        (lambda z: z.to("meta"), "zero_point on meta"),
    ],
)
def test_bad_zero_points(change, message):
    p = make_problem(5, 77, 296, 128, 8, asymmetric=True)
    with pytest.raises(InputError, match=message):
        accumulate(p, change(p.zero_point))


def test_eight_bit_weights_have_none():
    p = make_problem(5, 77, 296, -1, 1, weight_bits=8)
    with pytest.raises(InputError, match="packed 4-bit codes"):
        accumulate(p, torch.zeros_like(p.scale, dtype=torch.int8))


@pytest.mark.parametrize("group_size, packing", [(128, "plain"), (32, "tiled"), (-1, "plain")])
def test_opcheck(group_size, packing):
    p = make_problem(3, 66, 200, group_size, 8, packing, asymmetric=True)
    torch.library.opcheck(ACCUMULATE_OP, (p.xq, p.qdata, p.scale, *p.weight_args, KERNEL_ABI, p.zero_point))
    torch.library.opcheck(LINEAR_OP, linear_arguments(p, p.bias, torch.bfloat16))
    x = torch.randn(3, 200, requires_grad=True)
    torch.library.opcheck(LINEAR_OP, linear_arguments(p, p.bias.clone().requires_grad_(), ste_input=x))
    gated = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, p.bias, "silu", *p.weight_args, torch.float32)
    torch.library.opcheck(GATED_OP, (*gated, KERNEL_ABI, False, p.zero_point))
    weight = (p.qdata, p.scale, p.row_scale, 66, 200, group_size, packing, torch.float32, p.zero_point)
    torch.library.opcheck(WEIGHT_OP, weight)


def test_gradient_is_that_of_the_weight():
    p = make_problem(3, 66, 200, 128, 8, asymmetric=True)
    x = torch.randn(3, 200, requires_grad=True)
    y = LINEAR_OP(*linear_arguments(p, ste_input=x))
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = WEIGHT_OP(p.qdata, p.scale, p.row_scale, 66, 200, 128, "plain", torch.float32, p.zero_point)
    assert torch.equal(x.grad, grad @ dense)


def test_gated_op():
    p = make_problem(5, 2 * 64, 296, 128, 8, "tiled", asymmetric=True)
    weight = (p.qdata, p.scale, p.row_scale, p.bias, "silu", *p.weight_args, torch.float32, KERNEL_ABI)
    found = GATED_OP(p.xq, p.token_scale, *weight, zero_point=p.zero_point)
    assert torch.equal(found, gate(p.linear(), "silu"))


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("gather", [False, True])
def test_grouped_op(packing, gather):
    p = make_grouped((3, 0, 5), 1, 66, 200, 64, gather, scale_bits=8, packing=packing, asymmetric=True)
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, None, p.offsets, *p.form, torch.float32, KERNEL_ABI)
    found = GROUPED_OP(*operands, *p.indices, None, p.zero_point)
    assert torch.equal(found, p.expected)
    torch.library.opcheck(GROUPED_OP, (*operands, *p.indices, None, p.zero_point))
    x = torch.randn(p.xq.shape, requires_grad=True)
    grad = torch.randn_like(found)
    GROUPED_OP(*operands, *p.indices, x, p.zero_point).backward(grad)
    weight = (p.qdata, p.scale, p.row_scale, p.offsets, p.xq.shape[0], 66, 200, 64, packing)
    assert torch.equal(x.grad, INPUT_GRAD_OP(grad, *weight, *p.indices, p.zero_point))
    assert not torch.equal(x.grad, INPUT_GRAD_OP(grad, *weight, *p.indices))
    with pytest.raises(InputError, match="zero_point"):
        GROUPED_OP(*operands, *p.indices, None, p.zero_point[:2])


# --- models -------------------------------------------------------------------------------------------------------------


def weight_of(rows, features, asymmetric=True, seed=0, group_size=64, scale_bits=8):
    """A weight from random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-features // group_size)
    codes = torch.randint(-8, 8, (rows, features), generator=generator, dtype=torch.int8)
    zero = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator) * 0.01 + 0.001
    options = dict(group_size=group_size, scale_bits=scale_bits, dtype=torch.float32)
    return IntScaleTensor.from_codes(codes, scale, zero_point=zero if asymmetric else None, **options)


def parameter(*args, **options):
    return nn.Parameter(weight_of(*args, **options), requires_grad=False)


class Block(nn.Module):
    """Two groups of siblings, the first with one symmetric member, and a gated activation."""

    def __init__(self, **options):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(192, 64, bias=i == 0) for i in range(3))
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 9)
        for seed, (name, layer) in enumerate(self.named_children()):
            rows, features = layer.weight.shape
            layer.weight = parameter(rows, features, name != "k", seed, **options)
        self.requires_grad_(False)

    def forward(self, x):
        z = self.q(x) * self.k(x) + self.v(x)
        return self.down(torch.nn.functional.silu(self.gate(z)) * self.up(z))


def by_definition(x, weight, bias=None):
    xq, token_scale = quantize_per_token_aten(x)
    dense = weight.replaced(per_tensor_scale=torch.ones_like(weight.row_scale)).dequantize(torch.float64)
    y = (xq.double() @ dense.t()).float() * token_scale * weight.row_scale.view(-1)
    return y if bias is None else y + bias


@pytest.mark.parametrize("group_size, scale_bits", [(64, 8), (64, 3), (32, 4), (-1, 1)])
def test_eager_layer_is_the_definition(group_size, scale_bits):
    model = Block(group_size=group_size, scale_bits=scale_bits)
    x = torch.randn(5, 192)
    for layer in (model.q, model.k):
        assert torch.equal(layer(x), by_definition(x, layer.weight, layer.bias))


def exactly(model):
    """``model`` through all passes, run op by op."""
    settings, _ = parse_options(None, {"intscale.force_passes": ["gated_activation"]})

    def backend(gm, example_inputs):
        rewrite = rewrite_graph(gm, example_inputs, settings)
        counts.append(rewrite.counts)
        return bind(rewrite, lambda graph, _: graph.forward)

    counts: list[dict] = []
    return torch.compile(model, backend=backend, fullgraph=True), counts


@pytest.mark.parametrize("tokens", [3, 300])
def test_passes_keep_every_bit(tokens):
    """Merged siblings of both kinds, and the gated activation."""
    model, x = Block(), torch.randn(tokens, 192)
    with torch.no_grad():
        wanted = model(x)
        compiled, counts = exactly(model)
        assert torch.equal(compiled(x), wanted)
        assert torch.equal(compiled(x), wanted)
    assert counts[0]["merge_siblings"] == 2 and counts[0]["fuse"] == 3
    assert counts[0]["gated_activation"] == (tokens >= 256)


def test_merged_zero_points_are_kept_once_and_follow_writes():
    """Weights that all have zero points move into one piece of memory; a write to one of them is seen."""
    model, x = Block(), torch.randn(3, 192)
    with torch.no_grad():
        compiled, _ = exactly(model)
        compiled(x)
        gate, up = model.gate.weight, model.up.weight
        assert gate.zero_point.untyped_storage().data_ptr() == up.zero_point.untyped_storage().data_ptr()
        for layer in (model.gate, model.k, model.q):
            layer.weight.copy_(weight_of(*layer.weight.shape, layer is not model.k, seed=99))
            assert torch.equal(compiled(x), model(x))


def test_a_graph_does_not_serve_the_other_kind():
    model = nn.Sequential(nn.Linear(192, 64, bias=False))
    x = torch.randn(3, 192)
    with torch.no_grad():
        compiled, counts = exactly(model)
        for asymmetric in (False, True, False):
            model[0].weight = parameter(64, 192, asymmetric, seed=5)
            assert torch.equal(compiled(x), by_definition(x, model[0].weight))
    assert len(counts) == 2


@pytest.mark.generated
def test_inductor_on_a_cpu():
    model, x = Block(), torch.randn(5, 192)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, backend="intscale")(x), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(rewritten(model.q)(x), model.q(x))


def test_experts_compiled():
    codes = IntScaleTensor.from_hp(
        torch.randn(3, 64, 96), IntScaleConfig(group_size=32, scale_bits=8, scale_search="absmax")
    )
    zero = torch.randint(-8, 8, codes.scale.shape, dtype=torch.int8)
    weight, offsets = codes.replaced(zero_point=zero).validate(), torch.tensor([2, 2, 7], dtype=torch.int32)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.grouped_mm(x, self.stack.transpose(-2, -1), offs=offsets)

    model, x = Experts(), torch.randn(7, 96).bfloat16()
    wanted = torch.cat([by_definition(part, weight[e]).bfloat16() for e, part in ((0, x[:2]), (2, x[2:]))])
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        compiled, counts = exactly(model)
        assert torch.equal(compiled(x), wanted) and counts[0]["experts"] == 1


def test_explain_says_asymmetric():
    report = explain(Block(), torch.randn(5, 192))
    rows = {layer.name.rpartition(".")[0]: layer for layer in report.layers}
    assert {name for name, layer in rows.items() if layer.asymmetric} == {"q", "v", "gate", "up", "down"}
    assert "W4A8 asymmetric" in str(report) and "accumulate" in rows["q"].kernel
    assert "fold" in explain(Block(scale_bits=3), torch.randn(5, 192)).layers[-1].kernel


def test_gluon_is_refused_with_a_reason():
    from intscale_compile.kernels.gluon_launch import unsupported_format

    assert unsupported_format(4096, 128, 4, 4, "tiled") is None
    assert unsupported_format(4096, 128, 4, 4, "tiled", asymmetric=True) == "zero points"
