"""Weights and products of forms that no pass and no kernel takes: left alone, refused or run as they are, and said so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, explain
from intscale_compile.errors import UnsupportedOpError, WeightError
from intscale_compile.reasons import Reason
from intscale_compile.tensors.selection import left_alone_by_default
from tests.support.compiled import rewritten

CONFIG = IntScaleConfig(group_size=32, scale_search="absmax")
X = torch.randn(5, 64)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(model):
    quantize_(model.requires_grad_(False), CONFIG)
    return model


class Wide(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.wide, self.last = nn.Linear(64, 64, dtype=dtype), nn.Linear(64, 32)

    def forward(self, x):
        y = self.wide(x.to(self.wide.weight.dtype))
        return self.last((y.real if y.is_complex() else y).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_weights_of_wide_dtypes_are_left_alone_by_both_doors(dtype):
    """They were quantized, and every call failed: no product takes their activation."""
    model = quantized(Wide(dtype))
    assert left_alone_by_default(model) == {id(model.wide): Reason.WEIGHT_DTYPE}
    assert type(model.wide.weight) is nn.Parameter and isinstance(model.last.weight, IntScaleTensor)
    assert torch.equal(rewritten(model)(X), model(X))
    rows = {row.name: row.reason for row in explain(model, X).layers}
    assert rows == {"wide.weight": "ACTIVATION_DTYPE", "last.weight": None}  # in its product both are


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_refused(layout):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    model[1].weight = nn.Parameter(getattr(model[1].weight.detach(), layout)(), requires_grad=False)
    with pytest.raises(WeightError, match=r"1.weight has layout torch\._?\w+: call to_dense\(\)"):
        quantize_(model, CONFIG)
    assert type(model[0].weight) is nn.Parameter


class Parts(nn.Linear):
    def forward(self, x):
        return torch.stack([F.linear(x, self.weight[::2]), F.linear(x, self.weight[1::2])], -1).flatten(-2)


class Operator(nn.Linear):
    def forward(self, x):
        return torch.ops.aten.mm(x, self.weight.t())


class Overload(nn.Linear):
    def forward(self, x):
        return torch.ops.aten.addmm.default(self.bias, x, torch.ops.aten.t.default(self.weight))


class Function(nn.Linear):
    def forward(self, x):
        return torch.ops.aten.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [Operator, Overload, Function])
def test_operators_of_aten_are_products_like_any_other(kind):
    """explain said that they were in no graph, and a plain weight stayed plain."""
    model = quantized(nn.Sequential(kind(64, 64)))
    rows = [(row.name, row.quantized, row.kernel) for row in explain(model, X).layers]
    named = [
        (row.name, row.quantized, row.kernel) for row in explain(quantized(nn.Sequential(nn.Linear(64, 64))), X).layers
    ]
    assert rows == named
    plain = explain(nn.Sequential(kind(64, 64)).requires_grad_(False), X).layers
    assert [(row.name, row.quantized, row.reason) for row in plain] == [("0.weight", True, None)]


@pytest.mark.parametrize("kind", [Parts])
def test_a_quantized_weight_in_a_form_that_no_pass_knows_runs_quantized(kind):
    """explain called it left alone."""
    model, plain = nn.Sequential(kind(64, 64)).requires_grad_(False), nn.Linear(64, 64, bias=False)
    quantize_(
        model, CONFIG, filter_fn=lambda module, name: isinstance(module, kind)
    )  # named: by itself it is left alone
    plain.weight = model[0].weight
    assert torch.equal(rewritten(model)(X), plain(X))
    (row,) = explain(model, X).layers
    assert (row.name, row.quantized, row.kernel) == ("0.weight", True, "unfused: in a form that no pass knows")


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.last = nn.Parameter(torch.randn(3, 64, 64) / 8), nn.Linear(64, 64)

    def forward(self, x):
        return self.last(x @ self.w[1] + F.linear(x, self.w[2]))


def test_one_row_for_a_parameter_whose_parts_are_in_several_products():
    assert [row.name for row in explain(quantized(Stack()), X).layers] == ["w", "last.weight"]


class Refused(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T[None]


def test_what_is_refused_stays_our_error_behind_a_graph_break():
    """Dynamo compiled the dispatch itself, and resumed it without the guard against asking again: RecursionError."""
    model = Refused(64, 64).requires_grad_(False)
    quantize_(model, CONFIG, filter_fn=lambda module, name: True)  # named: by itself it is left alone
    for call in (model, rewritten(model, fullgraph=False)):
        with pytest.raises(UnsupportedOpError, match=r"unsqueeze .* use weight.dequantize\(\) first"):
            call(X)


def test_traces_and_parametrizations_of_quantized_weights_are_refused():
    """A trace was made, and saving it ended the process; weight_norm was set up and every call failed with a TypeError."""
    model = quantized(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(UnsupportedOpError, match=r"torch.jit.trace .* use torch.export"):
        torch.jit.trace(model, X)
    with pytest.raises(WeightError, match="weight_norm: remove the parametrization before quantize_"):
        nn.utils.parametrizations.weight_norm(model[0])
    assert torch.isfinite(model(X)).all() and not nn.utils.parametrize.is_parametrized(model[0])
