"""Products with a range of a weight's output rows: both doors take them, with the bits of the whole weight's rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor, explain, quantize
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.reasons import Reason
from intscale_compile.tensors.linear import linear
from tests.support.graphs import Together, capture, count, run

ROWS = {  # of a weight [96, 64]
    "first": (lambda x, w: F.linear(x, w[:32]), 0, 32),
    "last": (lambda x, w: F.linear(x, w[-32:, :]), 64, 96),
    "ellipsis": (lambda x, w: F.linear(x, w[16:48, ...]), 16, 48),
    "twice": (lambda x, w: F.linear(x, w[16:][:16]), 16, 32),
    "transposed before": (lambda x, w: x @ w.t()[:, 32:64], 32, 64),
    "transposed after": (lambda x, w: torch.matmul(x, w[32:64].mT), 32, 64),
    "narrow": (lambda x, w: F.linear(x, w.narrow(0, -64, 32)), 32, 64),
    "chunk": (lambda x, w: F.linear(x, w.chunk(3)[-1]), 64, 96),
    "split": (lambda x, w: F.linear(x, torch.split(w, [64, 32])[1]), 64, 96),
    "split along the outputs": (lambda x, w: x @ w.T.split(48, dim=-1)[1], 48, 96),
    "inner": (lambda x, w: torch.inner(x, w[32:]), 32, 96),
    "aten": (lambda x, w: torch.ops.aten.linear.default(x, torch.ops.aten.slice.Tensor(w, 0, 32, 2**63 - 1)), 32, 96),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(32), x, w[:32].t()) - 1, 0, 32),
}
LEFT_ALONE = {
    "features": lambda x, w: F.linear(x[:, :32], w[:, :32]),
    "both": lambda x, w: F.linear(x[:, :32], w[:32, :32]),
    "steps": lambda x, w: F.linear(x, w[::2]),
    "gathered": lambda x, w: F.linear(x, w[torch.arange(32)]),
    "features of the transpose": lambda x, w: x[:, :32] @ w.t()[:32],
}


class Part(nn.Module):
    """A product with a part of the weight of a layer that is also called."""

    def __init__(self, form):
        super().__init__()
        self.form, self.layer = form, nn.Linear(64, 96, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.form(x, self.layer.weight)


def rewritten(model, *xs, **options):
    rewrite = capture(model, *xs, **options)
    apply_passes(rewrite, PASSES)
    return rewrite


def test_rows_of_a_weight_are_quantized_by_both_doors():
    model, xs = Together(Part(form) for form, _, _ in ROWS.values()), [torch.randn(4, 64) for _ in ROWS]
    twin = copy.deepcopy(model)
    quantize(twin, IntScaleConfig())
    ranges = [(start, end) for _, start, end in ROWS.values()]
    for door in (model, twin):
        rewrite = rewritten(door, *xs)
        found = {name: (c.name, c.reason, c.shape) for name, c in zip(ROWS, rewrite.candidates, strict=True)}
        wanted = [(f"models.{i}.layer.weight", None, (end - start, 64)) for i, (start, end) in enumerate(ranges)]
        assert found == dict(zip(ROWS, wanted)) and count(rewrite, LINEAR_OP) == len(ROWS)
        results = run(rewrite)
        for name, part, x, y, (start, end) in zip(ROWS, model.models, xs, results, ranges, strict=True):
            rows = IntScaleTensor.from_hp(part.layer.weight, IntScaleConfig())[start:end]
            assert torch.allclose(y, linear(x, rows, None), rtol=0, atol=0 if name != "addmm" else 1e-6), name
    for name, part, x, y in zip(ROWS, twin.models, xs, results, strict=True):
        assert torch.equal(part(x), y), name


def test_other_parts_are_left_alone_with_a_reason():
    rewrite = rewritten(Together(map(Part, LEFT_ALONE.values())), *(torch.randn(4, 64) for _ in LEFT_ALONE))
    found = dict(zip(LEFT_ALONE, ((c.name, c.reason) for c in rewrite.candidates), strict=True))
    assert found == {name: (f"models.{i}.layer.weight", Reason.NOT_CONSTANT) for i, name in enumerate(LEFT_ALONE)}


class Reader(nn.Module):
    """A layer whose weight is read by its owner's ``forward``, and another."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(64, 96, bias=False), nn.Linear(64, 64)
        self.register_buffer("rows", torch.arange(0, 64, 2))
        self.requires_grad_(False)


class ByIndex(Reader):
    def forward(self, x):
        return F.linear(self.last(x), self.layer.weight[self.rows])


class BySelect(Reader):
    def forward(self, x):
        return self.last(x) @ torch.index_select(self.layer.weight, 0, self.rows).t()


class ByList(Reader):
    def forward(self, x):
        weight = self.layer.weight
        return F.linear(self.last(x), weight[[0, 5, 7], :])


class ByMask(Reader):
    def forward(self, x):
        return F.linear(self.last(x), self.layer.weight.t()[:, self.rows > 7].t())


class ByStep(Reader):
    def forward(self, x):
        return F.linear(self.last(x), self.layer.weight[::2])


class AlsoCalled(Reader):
    def forward(self, x):
        return self.layer(x)[:, :32] + F.linear(self.last(x), self.layer.weight[self.rows])


class ByColumn(Reader):
    def forward(self, x):
        return F.linear(self.last(x)[:, self.rows], self.layer.weight[:, self.rows])


def test_weights_whose_rows_are_picked_are_left_alone_by_both_doors():
    """quantize took them where they were written as an index, the compiler did not."""
    kinds = [ByIndex, BySelect, ByList, ByMask, ByStep, AlsoCalled, ByColumn]
    model, xs = Together(kind() for kind in kinds), [torch.randn(4, 64) for _ in kinds]
    model.models[kinds.index(ByMask)].rows = torch.arange(96)
    wanted = {f"models.{i}.{name}.weight" for i in range(len(kinds)) for name in ("layer", "last")}
    reasons = {name: Reason.NOT_CONSTANT if ".layer." in name else None for name in wanted}
    plain = rewritten(model, *xs)
    assert {c.name: c.reason for c in plain.candidates} == reasons
    twin = copy.deepcopy(model)
    quantize(twin, IntScaleConfig())
    rewrite = rewritten(twin, *xs)
    assert count(rewrite, LINEAR_OP) == len(kinds)
    for kind, part, x, tensors, weights in zip(kinds, twin.models, xs, run(rewrite), run(plain), strict=True):
        assert type(part.layer.weight) is nn.Parameter and isinstance(part.last.weight, IntScaleTensor), kind
        assert torch.equal(tensors, part(x)) and torch.equal(weights, part(x)), kind


class Attention(nn.Module):
    """q, k and v in one layer's weight, taken apart for three products."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.requires_grad_(False)

    def forward(self, x):
        q, k, v = self.qkv.weight.chunk(3)
        bias = self.qkv.bias
        return F.linear(x, q, bias[:64]) + F.linear(x, k) * F.linear(x, v)


def test_rows_that_follow_each_other_are_merged_without_a_copy():
    model, x = Attention(), torch.randn(4, 64)
    quantize(model, IntScaleConfig())
    rewrite = rewritten(model, x)
    weight = model.qkv.weight
    assert len(rewrite.candidates) == 3 and all(c.reason is None for c in rewrite.candidates)
    recipes = [recipe for recipe, part in rewrite.packed_inputs.values() if part == "qdata"]
    storages = {r.resolve(rewrite.example_inputs).qdata.untyped_storage().data_ptr() for r in recipes}
    assert storages == {weight.qdata.untyped_storage().data_ptr()}
    torch.testing.assert_close(run(rewrite)[0], model(x), rtol=0, atol=1e-6)


@pytest.mark.generated
def test_compiled_rows_follow_the_weight_and_are_explained_as_one_layer():
    model, x = Part(lambda x, w: F.linear(x, w[:32]) + F.linear(x, w[64:])), torch.randn(4, 64)
    report = explain(model, x)
    assert [(row.name, row.shape, row.quantized) for row in report.layers] == [("layer.weight", (96, 64), True)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="intscale", options={"cpp.simdlen": 1})
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.layer.weight.mul_(factor)
            found = compiled(x)
        twin = copy.deepcopy(model)
        quantize(twin, IntScaleConfig())
        assert torch.equal(found, twin(x))
    torch._dynamo.reset()
