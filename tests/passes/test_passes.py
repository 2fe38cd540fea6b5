"""Each pass: op counts before and after, idempotence, true metadata, dynamic tokens, and what it must leave alone."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.ops import dequantize, quantize_per_token
from intscale_compile.passes import PASSES, GraphRewrite, apply_passes
from intscale_compile.passes.match import LINEAR
from intscale_compile.reasons import Reason
from intscale_compile.tensors.linear import linear
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run

QUANTIZE, DEQUANTIZE_TOKEN, DEQUANTIZE_WEIGHT = quantize_per_token.OP, dequantize.TOKEN_OP, dequantize.WEIGHT_OP


class Siblings(nn.Module):
    def __init__(self, bias=False, sizes=(64, 32, 32), tiled=False):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, n, bias=bias) for n in sizes)
        self.requires_grad_(False)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def linears(rewrite):
    return sum(node.target in LINEAR for node in rewrite.graph.nodes)


def apply_until(rewrite, last):
    names = [p.name for p in PASSES]
    apply_passes(rewrite, PASSES[: names.index(last) + 1])


def test_insert_qdq_gives_the_readable_form():
    rewrite = capture(Siblings(), torch.randn(2, 5, 64))
    assert linears(rewrite) == 3
    apply_until(rewrite, "insert_qdq")
    assert rewrite.counts == {"local_shards": 0, "match": 3, "insert_qdq": 3}
    assert linears(rewrite) == count(rewrite, QUANTIZE) == count(rewrite, DEQUANTIZE_TOKEN) == 3
    assert count(rewrite, DEQUANTIZE_WEIGHT) == 3 and len(rewrite.packed_inputs) == 9
    assert_true_metadata(rewrite)


def test_qdq_form_runs_in_plain_pytorch_near_the_fused_one():
    model, x = Siblings(bias=True), torch.randn(2, 5, 64)
    qdq, fused = capture(model, x), capture(model, x)
    apply_until(qdq, "insert_qdq")
    apply_until(fused, "fuse")
    for a, b in zip(run(qdq), run(fused)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_share_quantize_keeps_one_per_activation():
    model = Siblings()
    rewrite = capture(lambda x: (*model(x), *model(x + 1)), torch.randn(2, 64))
    apply_until(rewrite, "share_quantize")
    assert (count(rewrite, QUANTIZE), count(rewrite, DEQUANTIZE_TOKEN), linears(rewrite)) == (2, 2, 6)
    assert rewrite.counts["share_quantize"] == 4
    assert_true_metadata(rewrite)


@pytest.mark.parametrize("write", ["add_", "iadd", "setitem", "out", "module", "functional"])
def test_share_quantize_respects_writes(write):
    a, b = (nn.Linear(64, 32, bias=False).requires_grad_(False) for _ in range(2))
    relu = nn.ReLU(inplace=True)

    def model(x):
        x = x * 1.0
        first = a(x)
        if write == "add_":
            x.view(-1).add_(1.0)
        elif write == "iadd":
            x += 1.0
        elif write == "setitem":
            x[0] = 2.0
        elif write == "module":
            relu(x)
        elif write == "functional":
            F.silu(x, True)
        else:
            torch.add(x, 1.0, out=x)
        return first, b(x)

    rewrite = capture(model, torch.randn(2, 64))
    apply_until(rewrite, "fuse")
    assert rewrite.counts["share_quantize"] == 0 and count(rewrite, LINEAR_OP) == 2


@pytest.mark.parametrize(
    "bias, sizes, packing",
    [
        *((True, sizes, packing) for sizes in ((64, 32, 32), (96, 96), (40, 24)) for packing in ("plain", "tiled")),
        (False, (64, 32, 32), "tiled"),
    ],
)
def test_merge_siblings_is_exact(bias, sizes, packing):
    model, x = Siblings(bias, sizes), torch.randn(3, 64)
    options = {"intscale.packing_format": packing}
    merged = capture(model, x, **options)
    apply_until(merged, "fuse")
    assert merged.counts["merge_siblings"] == 1
    assert (count(merged, LINEAR_OP), count(merged, QUANTIZE)) == (1, 1)
    assert len(merged.packed_inputs) == (4 if bias else 3)
    assert_true_metadata(merged)
    config = IntScaleConfig(packing_format=packing)
    for part, y in zip(model.parts, run(merged)):
        assert torch.equal(y, linear(x, IntScaleTensor.from_hp(part.weight, config), part.bias))


class Mixed(nn.Module):
    def __init__(self, bias_dtypes):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, 32, bias=dtype is not None) for dtype in bias_dtypes)
        for part, dtype in zip(self.parts, bias_dtypes):
            part.bias = part.bias if dtype is None else nn.Parameter(torch.randn(32, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def test_merge_siblings_leaves_mixed_formats_alone():
    model = Mixed([None, None, None])
    for i, group_size in enumerate((32, 64, 128)):
        name = f"parts.{i}"
        quantize_(model, IntScaleConfig(group_size=group_size), filter_fn=lambda m, n, name=name: n == name)
    rewrite = capture(model, torch.randn(2, 64))
    apply_until(rewrite, "fuse")
    assert rewrite.counts["merge_siblings"] == 0 and count(rewrite, LINEAR_OP) == 3 and count(rewrite, QUANTIZE) == 1


@pytest.mark.parametrize("places", [(True, False, True), (False, False, True), (False, True, False)])
def test_merge_siblings_with_and_without_bias_is_exact(places):
    """Whisper's keys have no bias, its queries and values have one."""
    model, x = Mixed([torch.float32 if place else None for place in places]), torch.randn(3, 64)
    x[0] = 0
    merged = capture(model, x)
    apply_until(merged, "fuse")
    assert merged.counts["merge_siblings"] == 1 and count(merged, LINEAR_OP) == 1
    assert_true_metadata(merged)
    for part, y in zip(model.parts, run(merged)):
        expected = linear(x, IntScaleTensor.from_hp(part.weight, IntScaleConfig()), part.bias)
        assert torch.equal(y.view(torch.int32), expected.view(torch.int32))  # zeros keep their sign


def test_fuse_leaves_no_qdq_behind():
    rewrite = capture(Siblings(True), torch.randn(2, 64))
    apply_until(rewrite, "fuse")
    assert count(rewrite, LINEAR_OP) == 1
    assert linears(rewrite) == count(rewrite, DEQUANTIZE_TOKEN) == count(rewrite, DEQUANTIZE_WEIGHT) == 0


def test_second_run_matches_nothing():
    rewrite = capture(Siblings(True), torch.randn(2, 64))
    apply_passes(rewrite, PASSES)
    text, counts = rewrite.gm.code, dict(rewrite.counts)
    apply_passes(rewrite, PASSES)
    assert rewrite.gm.code == text and rewrite.counts == counts
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, PASSES)
    assert set(again.counts.values()) == {0} and rewrite.gm.code == text


def test_dynamic_tokens():
    rewrite = capture(Siblings(True), torch.randn(3, 7, 64), dynamic=True)
    apply_passes(rewrite, PASSES)
    (fused,) = [n for n in rewrite.graph.nodes if n.target is LINEAR_OP]
    shape = fused.meta["example_value"].shape
    assert shape[-1] == 128 and all(isinstance(size, torch.SymInt) for size in shape[:2])
    static = [n.meta["example_value"] for n in rewrite.packed_inputs]
    assert all(type(size) is int for value in static for size in value.shape)


def test_no_output_aliases_an_input():
    rewrite = capture(Siblings(), torch.randn(2, 64))
    apply_passes(rewrite, PASSES)
    storages = {v.untyped_storage()._cdata for v in rewrite.example_inputs if isinstance(v, torch.Tensor)}
    assert all(y.untyped_storage()._cdata not in storages for y in run(rewrite))


class Holder(nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, x):
        # torch 2.11 cannot trace the unpacking of a ParameterList
        return self.function(x, *[self.weights[i] for i in range(len(self.weights))])


class ExpertHolder(Holder):
    """Named as modules of experts are."""


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight)


class Head(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.requires_grad_(False)

    def forward(self, x):
        return self.lm_head(self.embed(x.long().abs() % 100))


def overflowing():
    return Holder(lambda x, w: F.linear(x, w), torch.ones(32, 64) * 1e4), {"intscale.amplifier": 1 << 20}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32).requires_grad_(False)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


LEFT_ALONE = {
    Reason.SUBGRAPH: Checkpointed,
    Reason.LEFT_OPERAND: lambda: Holder(lambda x, w: w @ x.t(), torch.randn(32, 64)),
    Reason.EXPERTS: lambda: nn.Sequential(
        ExpertHolder(lambda x, w: torch.bmm(w, x.t().expand(4, -1, -1)), torch.randn(4, 32, 64))
    ),
    Reason.UNKNOWN_FORM: lambda: Holder(lambda x, w: torch.einsum("mk,nk->nm", x, w), torch.randn(32, 64)),
    Reason.SCALED_ADDMM: lambda: Holder(
        lambda x, w, b: torch.addmm(b, x, w, alpha=2), torch.randn(64, 32), torch.randn(32)
    ),
    Reason.BIAS_SHAPE: lambda: Holder(lambda x, w, b: torch.addmm(b, x, w), torch.randn(64, 32), torch.randn(1, 32)),
    Reason.NOT_CONSTANT: lambda: Holder(lambda x, w: F.linear(x, w * 2), torch.randn(32, 64)),
    Reason.TOO_SMALL: lambda: Holder(lambda x, w: F.linear(x, w), torch.randn(8, 64)),
    Reason.ROUTER: lambda: nn.Sequential(TopKRouter()),
    Reason.TIED_EMBEDDING: lambda: Head(True),
    Reason.OUTPUT_EMBEDDING: lambda: Head(False),
    Reason.ACTIVATION_DTYPE: lambda: Holder(
        lambda x, w: F.linear(x.double(), w), torch.randn(32, 64, dtype=torch.float64)
    ),
    Reason.NON_FINITE: lambda: Holder(lambda x, w: F.linear(x, w), torch.full((32, 64), float("inf"))),
    Reason.OVERFLOW_PROOF: overflowing,
    Reason.EXCLUDED: lambda: (
        Holder(lambda x, w: F.linear(x, w), torch.randn(32, 64)),
        {"intscale.skip": r"weights\.0"},
    ),
    Reason.NOT_SELECTED: lambda: (
        Holder(lambda x, w: F.linear(x, w), torch.randn(32, 64)),
        {"intscale.quantize_plain": False},
    ),
}


def test_weight_written_in_the_graph_is_not_constant():
    model = Holder(lambda x, w: F.linear(x, w.clone().mul_(2.0)), torch.randn(32, 64))
    second = Holder(lambda x, w: (w.add_(1.0), F.linear(x, w))[1], torch.randn(32, 64))
    for one in (model, second):
        rewrite = capture(one, torch.randn(4, 64))
        apply_passes(rewrite, PASSES)
        assert [c.reason for c in rewrite.candidates] == [Reason.NOT_CONSTANT]


@pytest.mark.parametrize("reason", LEFT_ALONE, ids=lambda r: r.name)
def test_reasons_for_leaving_a_product_alone(reason):
    made = LEFT_ALONE[reason]()
    model, options = made if isinstance(made, tuple) else (made, {})
    x = torch.randn(4, 64)
    rewrite = capture(model, x, **options)
    before = rewrite.gm.code
    apply_passes(rewrite, PASSES)
    assert [c.reason for c in rewrite.candidates] == [reason]
    assert count(rewrite, LINEAR_OP) == 0 and rewrite.packed_inputs == {}
    assert rewrite.gm.code == before


def test_product_of_two_activations_is_no_candidate():
    rewrite = capture(lambda x: x @ x.t(), torch.randn(4, 64))
    apply_passes(rewrite, PASSES)
    assert rewrite.candidates == []
